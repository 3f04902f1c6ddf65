"""The page of a map of embeddings: one HTML file with its data, thumbnails and program, which loads nothing.

File and class names are untrusted text. They are in the page as JSON without "<" and are displayed as text, never as
HTML. A content security policy in the page forbids loading anything.
"""

import base64
import html
import io
import json
import math
import re
from argparse import Namespace
from pathlib import Path

import numpy as np
from jaxtyping import Int
from PIL import Image

from simmim_jax.files import utf8_name, write_atomically
from simmim_jax.tools.embed.embeddings import Listing
from simmim_jax.tools.map.pictures import ReadPicture, square_tile
from simmim_jax.tools.map.vectors import evenly_spaced, project, read_vectors

SIDE = 64  # pixels of a thumbnail
TITLES = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}


def write_page(listing: Listing, path: Path, options: Namespace, read_picture: ReadPicture) -> None:
    """Write the page of at most `options.limit` images. path: the file of embeddings."""
    rows = evenly_spaced(len(listing.names), options.limit)
    positions = project(options.method, read_vectors(path, rows), options.seed, where=str(path))
    columns = math.ceil(math.sqrt(len(rows)))
    about = listing.about
    data = {
        "x": np.round(positions[:, 0], 4).tolist(),
        "y": np.round(positions[:, 1], 4).tolist(),
        "label": listing.labels[rows].tolist(),
        "name": [listing.names[row] for row in rows],
        "classes": about["classes"],
        "tile": SIDE,
        "columns": columns,
        "method": TITLES[options.method],
        "what": f"{about['what']}, step {about['step']} of {about['run']}",
    }
    page = make_page(data, make_sprite(rows, columns, read_picture), utf8_name(options.title or path.name))
    out = Path(options.out)
    write_atomically(out, page)
    print(f"{out}: {len(rows):,} of {len(listing.names):,} images, {out.stat().st_size / 2**20:.1f} MiB")


def make_sprite(rows: Int[np.ndarray, " n"], columns: int, read_picture: ReadPicture) -> str:
    """Return all thumbnails, row by row, in one JPEG as a data URI; "" if there are none."""
    pictures = [read_picture(row, SIDE) for row in rows.tolist()]
    if not any(pictures):
        return ""
    sprite = np.full((-(-len(rows) // columns) * SIDE, columns * SIDE, 3), 255, np.uint8)
    for n, picture in enumerate(pictures):
        top, left = n // columns * SIDE, n % columns * SIDE
        sprite[top : top + SIDE, left : left + SIDE] = square_tile(picture, SIDE)
    buffer = io.BytesIO()
    Image.fromarray(sprite).save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def make_page(data: dict, sprite: str, title: str) -> str:
    """Return the page as HTML.

    data: "x", "y" in -1..1, "label" (-1: none) and "name" of each point; "classes"; "tile", the side of a thumbnail in
    pixels, and "columns" of the sprite; "method" and "what", a line of text each. sprite: a data URI, or "" for none.
    """
    content = json.dumps(data, separators=(",", ":"))
    for character in "<>&":
        content = content.replace(character, f"\\u{ord(character):04x}")
    picture = f'<img id="sprite" alt="" src="{sprite}" hidden>' if sprite else ""
    parts = {"TITLE": html.escape(title), "SPRITE": picture, "DATA": content}
    return re.sub(
        "@(TITLE|SPRITE|DATA)@", lambda found: parts[found[1]], PAGE
    )  # one pass: inserted text is not searched


PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="simmim_jax">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>
  html, body { margin: 0; height: 100%; font: 14px/1.4 system-ui, sans-serif; color: #222; background: #fff; }
  body { display: flex; }
  #view { position: relative; flex: 1; min-width: 0; overflow: hidden; }
  #map { position: absolute; inset: 0; width: 100%; height: 100%; cursor: grab; touch-action: none; }
  #side { width: 250px; box-sizing: border-box; padding: 12px; border-left: 1px solid #ddd; overflow: auto; }
  #side h1 { font-size: 16px; margin: 0 0 4px; overflow-wrap: anywhere; }
  #side p { margin: 0 0 10px; color: #666; font-size: 12px; overflow-wrap: anywhere; }
  #side label { display: block; margin-bottom: 8px; }
  #filter { width: 100%; box-sizing: border-box; padding: 4px 6px; margin-bottom: 8px; }
  #legend button { display: flex; width: 100%; align-items: center; gap: 6px; padding: 2px 4px; border: 0;
    background: none; font: inherit; color: inherit; text-align: left; cursor: pointer; }
  #legend button:hover { background: #f2f2f2; }
  #legend button[aria-pressed="false"] { opacity: .35; }
  #legend span:nth-child(1) { flex: none; width: 12px; height: 12px; border-radius: 50%; }
  #legend span:nth-child(2) { flex: 1; overflow-wrap: anywhere; }
  #legend span:nth-child(3) { color: #888; font-variant-numeric: tabular-nums; }
  .row { display: flex; gap: 6px; margin-bottom: 8px; }
  .row button { flex: 1; padding: 3px; font: inherit; cursor: pointer; }
  #tip { position: absolute; display: none; pointer-events: none; padding: 6px; max-width: 280px; background: #fff;
    border: 1px solid #bbb; border-radius: 4px; box-shadow: 0 2px 8px #0003; overflow-wrap: anywhere; font-size: 12px; }
  #tip canvas { display: block; margin-bottom: 4px; image-rendering: auto; }
  #tip b { display: block; }
</style>
</head>
<body>
<div id="view"><canvas id="map"></canvas><div id="tip"><canvas></canvas><b></b><span></span></div></div>
<div id="side">
  <h1>@TITLE@</h1><p id="what"></p>
  <input id="filter" type="search" placeholder="names that contain ..." aria-label="names that contain">
  <label id="as"><input id="pictures" type="checkbox"> thumbnails as points</label>
  <div class="row"><button id="all">all</button><button id="none">none</button><button id="reset">reset</button></div>
  <div id="legend"></div>
  <p>Wheel: zoom. Drag: move. Click a class: on or off. Double-click: only this class.</p>
</div>
@SPRITE@
<script type="application/json" id="data">@DATA@</script>
<script>
"use strict";
const D = JSON.parse(document.getElementById("data").textContent);
const get = id => document.getElementById(id);
const map = get("map"), pen = map.getContext("2d"), tip = get("tip"), sprite = get("sprite");
const BASE = ["#4269d0", "#efb118", "#ff725c", "#3ca951", "#a463f2", "#ff8ab7", "#6cc5b0", "#9c6b4e", "#97bbf5",
  "#7d7d00"];
const groups = D.classes.map((name, n) => ({name, label: n})).filter(g => D.label.includes(g.label));
if (D.label.includes(-1)) groups.push({name: D.classes.length ? "no class" : "images", label: -1});
const color = label => label < 0 ? "#777" : D.classes.length <= BASE.length ? BASE[label]
  : `hsl(${(label * 137.508) % 360} 65% ${40 + 20 * (label % 2)}%)`;
const hidden = new Set();
let words = "", zoom = 1, left = 0, top_ = 0, over = -1, ratio = 1;

const isShown = n => !hidden.has(D.label[n]) && (!words || D.name[n].toLowerCase().includes(words));
const reach = values => Math.max(0.05, ...values.map(Math.abs));
const [reachX, reachY] = [reach(D.x), reach(D.y)];
const side = () => 0.47 * Math.min(map.clientWidth / reachX, map.clientHeight / reachY);
const place = n => [map.clientWidth / 2 + left + D.x[n] * side() * zoom,
  map.clientHeight / 2 + top_ - D.y[n] * side() * zoom];
const asPictures = () => sprite && get("pictures").checked;
const pictureSize = () => Math.min(D.tile, Math.max(12, 14 * Math.sqrt(zoom)));

function drawTile(context, n, x, y, size) {
  const column = n % D.columns, row = Math.floor(n / D.columns);
  context.drawImage(sprite, column * D.tile, row * D.tile, D.tile, D.tile, x, y, size, size);
}

function draw() {
  ratio = window.devicePixelRatio || 1;
  map.width = map.clientWidth * ratio;
  map.height = map.clientHeight * ratio;
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  const radius = Math.min(7, (D.name.length > 3000 ? 2 : 3.2) * Math.sqrt(Math.sqrt(zoom)));
  for (let n = 0; n < D.name.length; n++) {
    if (!isShown(n)) continue;
    const [x, y] = place(n);
    if (x < -50 || y < -50 || x > map.clientWidth + 50 || y > map.clientHeight + 50) continue;
    pen.fillStyle = color(D.label[n]);
    if (asPictures()) {
      const size = pictureSize();
      pen.fillRect(x - size / 2 - 2, y - size / 2 - 2, size + 4, size + 4);
      drawTile(pen, n, x - size / 2, y - size / 2, size);
    } else {
      pen.globalAlpha = 0.8;
      pen.beginPath();
      pen.arc(x, y, radius, 0, 7);
      pen.fill();
      pen.globalAlpha = 1;
    }
  }
  if (over >= 0 && isShown(over)) {
    const [x, y] = place(over), size = asPictures() ? pictureSize() * 0.8 : radius + 3;
    pen.lineWidth = 2;
    pen.strokeStyle = "#000";
    pen.beginPath();
    pen.arc(x, y, size, 0, 7);
    pen.stroke();
  }
}

function nearest(x, y) {
  let best = -1, least = asPictures() ? (pictureSize() * 0.7) ** 2 : 144;
  for (let n = 0; n < D.name.length; n++) {
    if (!isShown(n)) continue;
    const [px, py] = place(n), distance = (px - x) ** 2 + (py - y) ** 2;
    if (distance <= least) { best = n; least = distance; }
  }
  return best;
}

function point(x, y) {
  over = nearest(x, y);
  tip.style.display = over < 0 ? "none" : "block";
  if (over >= 0) {
    const picture = tip.children[0], size = 128;
    picture.style.display = sprite ? "block" : "none";
    if (sprite) {
      picture.width = picture.height = size;
      drawTile(picture.getContext("2d"), over, 0, 0, size);
    }
    tip.children[1].textContent = D.label[over] < 0 ? "" : D.classes[D.label[over]];
    tip.children[2].textContent = D.name[over];
    const flipX = x + tip.offsetWidth + 20 > map.clientWidth, flipY = y + tip.offsetHeight + 20 > map.clientHeight;
    tip.style.left = (flipX ? Math.max(0, x - tip.offsetWidth - 12) : x + 12) + "px";
    tip.style.top = (flipY ? Math.max(0, y - tip.offsetHeight - 12) : y + 12) + "px";
  }
  draw();
}

function zoomBy(factor, x, y) {
  const now = Math.min(400, Math.max(0.5, zoom * factor)), cx = x - map.clientWidth / 2, cy = y - map.clientHeight / 2;
  left = cx - (cx - left) * now / zoom;
  top_ = cy - (cy - top_) * now / zoom;
  zoom = now;
  point(x, y);
}

function reset() { zoom = 1; left = top_ = 0; draw(); }

function showLegend() {
  for (const button of get("legend").children)
    button.setAttribute("aria-pressed", String(!hidden.has(Number(button.dataset.label))));
  draw();
}

for (const {name, label} of groups) {
  const button = document.createElement("button"), parts = [0, 1, 2].map(() => document.createElement("span"));
  button.dataset.label = label;
  parts[0].style.background = color(label);
  parts[1].textContent = name;
  parts[2].textContent = D.label.filter(each => each === label).length;
  button.append(...parts);
  button.onclick = () => { hidden.has(label) ? hidden.delete(label) : hidden.add(label); showLegend(); };
  button.ondblclick = () => {
    groups.forEach(group => hidden.add(group.label));
    hidden.delete(label);
    showLegend();
  };
  get("legend").append(button);
}
get("what").textContent = `${D.name.length} images, ${D.method}: ${D.what}`;
get("all").onclick = () => { hidden.clear(); showLegend(); };
get("none").onclick = () => { groups.forEach(group => hidden.add(group.label)); showLegend(); };
get("reset").onclick = reset;
get("filter").oninput = event => { words = event.target.value.toLowerCase(); draw(); };
get("pictures").onchange = draw;
get("as").style.display = sprite ? "block" : "none";

let held = null;
map.onpointerdown = event => { held = [event.offsetX, event.offsetY]; map.setPointerCapture(event.pointerId); };
map.onpointerup = map.onpointercancel = () => { held = null; };
map.onpointermove = event => {
  if (held) {
    left += event.offsetX - held[0];
    top_ += event.offsetY - held[1];
    held = [event.offsetX, event.offsetY];
  }
  point(event.offsetX, event.offsetY);
};
map.onpointerleave = () => { over = -1; tip.style.display = "none"; draw(); };
map.addEventListener("wheel", event => {
  event.preventDefault();
  zoomBy(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), event.offsetX, event.offsetY);
}, {passive: false});
window.onresize = draw;
if (sprite && !sprite.complete) sprite.onload = draw;
showLegend();
</script>
</body>
</html>
"""
