"""The page's style sheet and its few lines of script."""

# Okabe and Ito's hues, which the colour-blind can tell apart, made darker on white and lighter on black.
STYLE = """
:root {
  color-scheme:light dark; --bg:#fff; --fg:#1b1f24; --soft:#57606a; --rule:#d5dae0; --box:#f5f7f9; --link:#0b5cad;
  --good:#00694d; --bad:#a33b00; --on:#fff;
}
.s0 { --c:#0072b2 }
.s1 { --c:#c04e00 }
.s2 { --c:#00805e }
.s3 { --c:#a8497f }
.s4 { --c:#b07500 }
.s5 { --c:#3f97cc }
.s6 { --c:#6a6a6a }
.s7 { --c:#857600 }
@media (prefers-color-scheme: dark) {
  :root {
    --bg:#13171b; --fg:#e7eaee; --soft:#a3adb8; --rule:#3a424b; --box:#1c2229; --link:#7db8f0; --good:#4cd3a5;
    --bad:#ff9a63; --on:#13171b;
  }
  .s0 { --c:#56aeee }
  .s1 { --c:#ff8a4c }
  .s2 { --c:#2fc79b }
  .s3 { --c:#e89bcb }
  .s4 { --c:#f0b030 }
  .s5 { --c:#a9dbf7 }
  .s6 { --c:#b5b5b5 }
  .s7 { --c:#f0e442 }
}
* { box-sizing:border-box }
body {
  margin:0 auto; padding:1.5rem 1rem 4rem; max-width:70rem; background:var(--bg); color:var(--fg);
  font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif; overflow-wrap:anywhere;
}
h1 { font-size:1.7rem; line-height:1.2; margin:0 0 .5rem }
h2 { font-size:1.35rem; margin:2.5rem 0 .75rem }
h3 { font-size:1.05rem; margin:1.5rem 0 .5rem }
a { color:var(--link) }
nav { display:flex; flex-wrap:wrap; gap:.25rem 1rem }
.summary { color:var(--soft); margin:.25rem 0 .75rem }
small { font-size:.82rem; color:var(--soft); font-weight:400 }
.warning { border-left:4px solid var(--bad); background:var(--box); padding:.5rem .75rem }
.verdicts { list-style:none; padding:0; display:grid; gap:.5rem }
.verdicts li { background:var(--box); border-radius:6px; padding:.6rem .8rem }
.runtime { display:block }
.verdicts span { display:block; padding-left:1.5em; text-indent:-1.5em }
.verdicts span::before { display:inline-block; width:1.5em; text-indent:0; font-weight:700 }
.win::before { content:"\\2713"; color:var(--good) }
.loss::before { content:"\\2717"; color:var(--bad) }
.tie::before { content:"="; color:var(--soft) }
.open::before { content:"\\2013"; color:var(--soft) }
.key,.legend { list-style:none; padding:0; margin:0; display:flex; flex-wrap:wrap }
.key { gap:.5rem 1.75rem }
.key label { display:flex; gap:.5rem }
.key input { margin:6px 0 auto; accent-color:var(--link) }
.key small { display:block }
.legend { gap:.1rem .9rem; font-size:.85rem }
.mark { width:34px; height:16px; flex:none; vertical-align:-2px }
.key .mark { margin-top:4px }
.figures { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,27rem),1fr)); gap:.5rem 2rem }
figure { margin:0; min-width:0 }
figcaption p { margin:.25rem 0; font-size:.9rem; color:var(--soft) }
.chart { display:block; width:100%; height:auto }
.chart text { font-size:13.5px; fill:var(--fg) }
.chart .name { fill:var(--soft); font-size:12.5px }
.grid { stroke:var(--rule); stroke-width:1 }
.asked { stroke:var(--rule); stroke-width:1; stroke-dasharray:1 3 }
.axis { stroke:var(--soft); fill:none }
.dense { stroke:var(--fg); stroke-width:1.5 }
.chance { stroke:var(--soft); stroke-width:1.5; stroke-dasharray:1 4; stroke-linecap:round }
.line { stroke:var(--c); stroke-width:2; fill:none }
.whisker { stroke:var(--c); stroke-width:1.5; opacity:.4 }
.m0 .line { stroke-width:3 }
.point { fill:var(--c); stroke:var(--bg); stroke-width:1 }
.diagnostic .line,.diagnostic.mark .line { stroke-dasharray:5 4; stroke-width:1.5 }
.diagnostic .point { fill:var(--bg); stroke:var(--c); stroke-width:1.5 }
.scroll { overflow-x:auto; border:1px solid var(--rule); border-radius:6px }
table {
  border-collapse:collapse; width:100%; font-size:.93rem; font-variant-numeric:tabular-nums; overflow-wrap:normal;
}
th,td { padding:.4rem .7rem; text-align:left; vertical-align:top; border-top:1px solid var(--rule) }
thead th { border-top:0; background:var(--box); vertical-align:bottom }
th small { display:block; white-space:nowrap }
td { white-space:nowrap }
tbody th { font-weight:500; min-width:9rem }
tbody th,thead th:first-child { position:sticky; left:0 }
tbody th { background:var(--bg) }
.named { display:flex; gap:.5rem }
.named span { min-width:6.5rem; max-width:18rem; overflow-wrap:break-word }
.named .mark { margin-top:4px }
.absent td { white-space:normal }
.absent td div { width:max-content; max-width:min(44rem,calc(100vw - 14rem)); overflow-wrap:anywhere }
.absent,.reference { color:var(--soft) }
.reference th { font-style:italic }
.group th { background:var(--box); font-size:.85rem; color:var(--soft) }
.spread { color:var(--soft); font-weight:400 }
.badge {
  background:var(--good); color:var(--on); border-radius:4px; padding:0 .35em; font-size:.75rem; margin-left:.2em;
}
.tiles { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(47%,12rem),1fr)); gap:1rem .75rem }
video,img { display:block; max-width:100%; width:100%; height:auto; border-radius:4px; background:#000 }
.tiles small { display:block }
.heat { margin-top:1rem }
.heat video { max-width:min(100%,40rem) }
blockquote { margin:.25rem 0; padding-left:.8rem; border-left:3px solid var(--rule) }
.clips+.clips { margin-top:2rem }
.missing { border:1px dashed var(--rule); padding:.5rem; margin:0; font-size:.85rem }
.controls { display:flex; flex-wrap:wrap; align-items:center; gap:.5rem 1rem }
.controls input { flex:0 1 20rem; min-width:0; accent-color:var(--link) }
button {
  font:inherit; padding:.25rem .8rem; border:1px solid var(--soft); border-radius:6px; background:var(--box);
  color:var(--fg); cursor:pointer;
}
:focus-visible { outline:2px solid var(--link); outline-offset:2px }
pre { background:var(--box); padding:.7rem; border-radius:6px; overflow-x:auto; margin:0 }
.facts { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(100%,18rem),1fr)); gap:0 2rem }
dl { margin:0 }
dl div { display:flex; gap:.75rem; border-top:1px solid var(--rule); padding:.2rem 0 }
dt { color:var(--soft); flex:0 0 45% }
dd { margin:0; min-width:0 }
summary { cursor:pointer; margin-bottom:.5rem }
li { margin:.25rem 0 }
"""

# The first video of a prompt leads: the others follow where it is sought to, and where it starts anew. The browser's
# own controls would cover small videos, so they wait for the pointer; without scripts they are always there.
SCRIPT = """
for (const clips of document.querySelectorAll(".clips")) {
  const videos = [...clips.querySelectorAll("video")];
  if (videos.length < 2) continue;
  const [lead, ...others] = videos, button = clips.querySelector("button"), slider = clips.querySelector("input");
  let playing = false;
  const show = () => { button.textContent = playing ? "Pause all" : "Play all in step"; };
  button.hidden = slider.hidden = false;
  for (const video of videos) {
    video.controls = false;
    video.addEventListener("pointerenter", () => { video.controls = true; });
    video.addEventListener("pointerleave", () => { video.controls = false; });
  }
  button.addEventListener("click", () => {
    playing = !playing;
    show();
    for (const video of videos) playing ? video.play() : video.pause();
    lead.currentTime = lead.currentTime;
  });
  slider.addEventListener("input", () => {
    playing = false;
    show();
    for (const video of videos) { video.pause(); video.currentTime = slider.value * (video.duration || 0); }
  });
  lead.addEventListener("seeked", () => {
    if (playing) for (const video of others) { video.currentTime = lead.currentTime; video.play(); }
  });
  lead.addEventListener("timeupdate", () => { if (playing) slider.value = lead.currentTime / lead.duration; });
}
"""
