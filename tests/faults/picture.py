"""Draws one fault as an SVG picture: each node's real state, and the states that each pool showed. Does no input or
output."""

from itertools import groupby

from pools import OFFICIAL, OURS, POOLS, ROLE_ONLY, WITHOUT_AGENT
from watch import NODES

TITLES = {
    OURS: "patroni-agent-check",
    OFFICIAL: "Patroni's HAProxy template (httpchk)",
    ROLE_ONLY: "an agent that reads only the role",
    WITHOUT_AGENT: "HAProxy alone (httpchk, the others NOLB)",
}
GREEN, GREY, BLUE, YELLOW, RED, WHITE = "#2e9e4f", "#b9bec6", "#9db4d6", "#e0b040", "#d3382f", "#ffffff"
SHOWN = {"UP": GREEN, "MAINT": GREY, "DRAIN": YELLOW, "NOLB": BLUE, "DOWN": RED}
RECOVERY = {False: GREEN, True: GREY, None: WHITE}
OUTCOME = {"written": GREEN, "read-only": RED}
LEFT, WIDTH, ROW = 60, 740, 18


def draw(run, title):
    seconds = run.ended - run.began
    x = lambda time: LEFT + WIDTH * (time - run.began) / seconds
    shapes, y = [text(10, 24, title, "bold 15px")], 62

    def block(title, changes):
        """A title, and a row for each node with the colours of its states: changes(node) is [(time, colour)]."""
        nonlocal y
        shapes.append(text(LEFT, y - 6, title, "bold 12px"))
        for node in NODES:
            shapes.append(text(10, y + 13, node, "12px"))
            runs = [next(run) for _, run in groupby(changes(node), key=lambda change: change[1])]
            for (begin, colour), (end, _) in zip(runs, runs[1:] + [(run.ended, None)]):
                width = x(end) - x(begin)
                shapes.append(f'<rect x="{x(begin):.1f}" y="{y}" width="{width:.1f}" height="{ROW - 3}" fill="{colour}"/>')
            y += ROW

    block(
        "PostgreSQL itself (green: takes writes, grey: standby, white: does not answer)",
        lambda node: [(truth.time, RECOVERY[truth.recovery]) for truth in run.truths if truth.node == node],
    )
    for pool in POOLS:
        y += 26
        block(TITLES[pool], lambda node: [(look.time, SHOWN[look.shown[pool, node]]) for look in run.looks])
        shapes.append(text(10, y + 8, "writes", "10px"))
        ends = sorted((OUTCOME.get(write.outcome, YELLOW), x(write.ended)) for write in run.writes if write.pool == pool)
        for colour, marks in groupby(ends, key=lambda end: end[0]):
            path = "".join(f"M{mark:.1f} {y}v7" for _, mark in marks)
            shapes.append(f'<path d="{path}" stroke="{colour}" stroke-width="1.5"/>')
        y += 8
    y += 22
    for second in range(int(seconds) + 1):
        mark = x(run.began + second)
        shapes.append(f'<path d="M{mark:.1f} 58V{y - 12}" stroke="#00000022"/>')
        shapes.append(text(mark - 4, y, f"{second} s", "10px"))
    legend = [*SHOWN.items(), ("write taken", GREEN), ("write refused as read-only", RED), ("no connection", YELLOW)]
    mark = LEFT
    for words, colour in legend:
        shapes.append(f'<rect x="{mark}" y="{y + 12}" width="14" height="10" fill="{colour}"/>')
        shapes.append(text(mark + 18, y + 21, words, "11px"))
        mark += 40 + 6 * len(words)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 20}" height="{y + 34}">\n'
        f'<rect width="100%" height="100%" fill="{WHITE}"/>\n' + "\n".join(shapes) + "\n</svg>\n"
    )


def text(x, y, words, font):
    return f'<text x="{x:.1f}" y="{y}" style="font: {font} sans-serif">{words}</text>'
