"""`heterostep ui`: a page in the browser that makes videos, dense and faster, side by side.

`order` is what a person asks for, checked; `jobs` makes it, one at a time, and knows nothing of the web; `server` puts
both behind HTTP; `static` is the page.
"""
