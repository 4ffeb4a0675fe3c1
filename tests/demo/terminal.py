"""Draws the demo's last view: reads the recording of script(1) from standard input, and writes an SVG."""

import re
import sys
from html import escape

BACK, FORE = "#14181f", "#d5dae2"
STYLES = {
    "0": "",
    "1": "font-weight:bold;fill:#ffffff",
    "31": "fill:#ff6b61",
    "32": "fill:#4fc46a",
    "33": "fill:#d49a4a",
    "34": "fill:#6ea8fe",
    "90": "fill:#8a93a1",
}
LETTER, LINE, MARGIN, COLUMNS = 9.0, 20, 18, 79

# Each view begins with a jump to the first line of the view before. The last view may be cut off.
views = re.split(r"\r\033\[\d+A", sys.stdin.buffer.read().decode())
if len(views) < 3:
    sys.exit("terminal.py: no view of the demo in what was recorded")
lines = re.sub(r"\033\[[KJ]", "", views[-2]).rstrip().splitlines()
shapes = []
for row, line in enumerate(lines):
    column, style = 0, ""
    for part in re.split(r"(\033\[\d+m)", line):
        if part.startswith("\033"):
            style = STYLES[part[2:-1]]
            continue
        for words in re.finditer(r"\S+( \S+)*", part):
            # textLength keeps the columns aligned in any font
            shapes.append(
                f'<text x="{MARGIN + LETTER * (column + words.start()):g}" y="{MARGIN + LINE * row + 15}" '
                f'textLength="{LETTER * len(words[0]):g}" style="{style}">{escape(words[0])}</text>'
            )
        column += len(part)
width, height = COLUMNS * LETTER + 2 * MARGIN, len(lines) * LINE + 2 * MARGIN
print(
    f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height}" viewBox="0 0 {width:g} {height}"\n'
    f'  font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="15" fill="{FORE}">\n'
    f'<rect width="100%" height="100%" rx="8" fill="{BACK}"/>\n' + "\n".join(shapes) + "\n</svg>"
)
