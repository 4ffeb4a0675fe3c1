"""One weather as a picture (SVG): what each pool showed of each server, under what was true. Pure."""

from watch import NODES, POOLS

TITLES = {
    "postgres-write": "patroni-agent-check",
    "official": "Patroni's HAProxy template (httpchk)",
    "role-only": "an agent that reads only the role",
}
COLOURS = {"UP": "#2e9e4f", "MAINT": "#b9bec6", "DRAIN": "#e0b040", "DOWN": "#d3382f"}
TRUTHS = {True: "#b9bec6", False: "#2e9e4f", None: "#ffffff"}
LEFT, WIDTH, ROW = 70, 720, 18


def draw(storm, title):
    seconds = storm.ended - storm.began
    x = lambda time: LEFT + WIDTH * (time - storm.began) / seconds
    shapes, y = [text(10, 22, title, "bold 15px")], 50

    def bars(node, changes):
        """A row of what held from when on: [(time, colour)]."""
        shapes.append(text(10, y + 13, node, "12px"))
        for (begin, colour), (end, _) in zip(changes, changes[1:] + [(storm.ended, None)]):
            shapes.append(
                f'<rect x="{x(begin):.1f}" y="{y}" width="{x(end) - x(begin):.1f}" height="{ROW - 3}" fill="{colour}"/>'
            )

    shapes.append(text(LEFT, y - 6, "PostgreSQL itself: takes writes, standby, does not answer", "bold 12px"))
    for node in NODES:
        bars(node, [(t.time, TRUTHS[t.recovery]) for t in storm.truths if t.node == node])
        y += ROW
    for pool in POOLS:
        y += 26
        shapes.append(text(LEFT, y - 6, TITLES[pool], "bold 12px"))
        for node in NODES:
            bars(node, [(look.time, COLOURS[look.shown[pool, node]]) for look in storm.looks])
            y += ROW
        for write in storm.writes:
            if write.pool == pool:
                colour = {"written": COLOURS["UP"], "read-only": COLOURS["DOWN"]}.get(write.outcome, "#e0b040")
                shapes.append(f'<rect x="{x(write.ended):.1f}" y="{y}" width="1.5" height="7" fill="{colour}"/>')
        shapes.append(text(10, y + 8, "writes", "10px"))
        y += 8
    y += 22
    for second in range(int(seconds) + 1):
        mark = x(storm.began + second)
        shapes.append(f'<path d="M{mark:.1f} 46V{y - 12}" stroke="#00000022"/>')
        shapes.append(text(mark - 4, y, f"{second}" if second else "0 s", "10px"))
    for number, (state, colour) in enumerate(COLOURS.items()):
        shapes.append(f'<rect x="{LEFT + 90 * number}" y="{y + 12}" width="14" height="10" fill="{colour}"/>')
        shapes.append(text(LEFT + 90 * number + 18, y + 21, state, "11px"))
    shapes.append(text(LEFT + 370, y + 21, "writes: green taken, red refused as read-only, yellow no connection", "11px"))
    body = "\n".join(shapes)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 20}" height="{y + 34}">\n'
        f'<rect width="100%" height="100%" fill="#fff"/>\n{body}\n</svg>\n'
    )


def text(x, y, words, font):
    return f'<text x="{x:.1f}" y="{y}" style="font: {font} sans-serif">{words}</text>'
