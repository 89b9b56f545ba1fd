"""`heterostep ui`: a page in the browser that makes videos, dense and faster, side by side.

`jobs` makes what `heterostep.order` has checked, one at a time, and knows nothing of the web; `estimate` says how long
it will take; `server` puts both behind HTTP; `static` is the page.
"""
