#!/usr/bin/env python3
"""Asks the Prometheus beside a site which alerts of units/examples/prometheus-rules.yml each fault raises, and when.
Records the metrics of each fault in a few lines. `tests/faults/alerts.py` tries the rules on these without a site."""

import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from itertools import accumulate, groupby

RULES = pathlib.Path("units/examples/prometheus-rules.yml")
DATA = pathlib.Path("tests/data/alerts")
BY_HAND = DATA / "by-hand.yml"
MANUAL = pathlib.Path("docs/monitoring.md")
DASHBOARD = pathlib.Path("units/examples/grafana-dashboard.json")
PROMETHEUS = "http://127.0.0.1:9090"
# Prometheus scrapes and evaluates every five seconds, and must raise an alert within a minute.
STEP, SOON = 5, 60
# the length of a fault that should raise an alert
LASTS = 75
# A hold or a drain is forgotten after hours. Beside a site (tests/faults/prometheus), and on what was recorded there, it is
# forgotten after half a minute.
HOURS, HALF_A_MINUTE = "for: 4h", "for: 30s"
# PostgresPatroniUnseen is pending until the site's Patronis have been read. PostgresServerUnsteady adds up ten minutes, and
# so several faults.
LEFT_OUT = 'alertname!~"PostgresPatroniUnseen|PostgresServerUnsteady"'
# the number of recorded steps before a fault
CALM = 3

NAMES = 'proxy=~"postgres-write|postgres-read|agents|reserve",server!~"waiting-room.*"'
# The recorded metrics: kind, metric, query, and the usual value, which needs no line if it never changes. The states of
# a server are recorded as U, D and R for UP, DOWN and DRAIN, and "." for any other.
STATES = {"U": "UP", "D": "DOWN", "R": "DRAIN"}
KEPT = {
    "weight": ("haproxy_server_weight", f"haproxy_server_weight{{{NAMES}}}", "1"),
    "agent": (
        "haproxy_server_agent_status",
        f'sum without (state) (haproxy_server_agent_status{{{NAMES},proxy!="agents",state=~"L7OK|L7OKC|L7STS"}})',
        "1",
    ),
    "answers": ("patroni_pools_agent_answers", "patroni_pools_agent_answers", "1"),
    "lost": ("patroni_pools_grace_lost", "patroni_pools_grace_lost", "0"),
    "held": ("patroni_pools_held", "patroni_pools_held", "0"),
    "primary": ("patroni_primary", "patroni_primary", None),
    "up": ("up", 'up{job="haproxy"}', "1"),
    "retries": ("haproxy_server_retry_warnings_total", f"haproxy_server_retry_warnings_total{{{NAMES}}}", "0"),
    "dcs": ("patroni_dcs_last_seen", "patroni_dcs_last_seen", "1"),
}
# Of a counter, whether it grows in a step by more than this; in a replay it then grows by GAIN.
COUNTERS, GAIN = {"retries": STEP, "dcs": 0}, 100


def ask(path, **parameters):
    with urllib.request.urlopen(f"{PROMETHEUS}/api/v1/{path}?{urllib.parse.urlencode(parameters)}", timeout=10) as answer:
        return json.load(answer)["data"]["result"]


def wait_until_quiet(patience=900):
    """Waits until no alert is firing or pending."""
    end = time.monotonic() + patience
    while alerts := ask("query", query=f"ALERTS{{{LEFT_OUT}}}"):
        if time.monotonic() > end:
            raise RuntimeError(f"alerts do not end: {[alert['metric'] for alert in alerts]}")
        time.sleep(0.5)


def first_raised(began, ended):
    """Returns {alert: seconds until it was first raised}."""
    series = ask("query_range", query=f'ALERTS{{alertstate="firing",{LEFT_OUT}}}', start=began, end=ended, step=1)
    first = {}
    for one in series:
        name, at = one["metric"]["alertname"], one["values"][0][0] - began
        first[name] = min(at, first.get(name, at))
    return first


def describe_differences(fault, first, second):
    """The alerts, in words, that differ from those of the fault, whose second part began after `second` seconds."""
    words = [f"{name} was not raised" for name in sorted(fault.alerts - first.keys())]
    words += [f"{name} was raised after {at:.0f} s" for name, at in first.items() if name not in fault.alerts]
    late = {name: at - (second if name in fault.then else 0) for name, at in first.items() if name in fault.alerts}
    return words + [f"{name} was raised only after {at:.0f} s" for name, at in late.items() if at > SOON]


def dashboard_queries():
    """The dashboard's queries, with its variables filled in."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    return [query.replace("$scope", "demo").replace("$__rate_interval", "1m") for query in queries]


def empty_panels(began, ended):
    """The dashboard's queries that never had a result."""
    return [query for query in dashboard_queries() if not ask("query_range", query=query, start=began, end=ended, step=STEP)]


def pack(values):
    return " ".join(f"{value}{len(list(same))}" for value, same in groupby(values))


def unpack(words):
    return [match[1] for word in words for match in [re.fullmatch(r"(.)(\d+)", word)] for _ in range(int(match[2]))]


def record(name, fault, began, second, ended):
    """The recorded lines of a fault, whose second part began after `second` seconds."""
    expected = [f"{alert}+{second:.0f}" if alert in fault.then else alert for alert in sorted(fault.alerts)]
    began = (began // STEP - CALM) * STEP
    times = range(int(began), int(ended) + STEP, STEP)
    series = lambda query: ask("query_range", query=query, start=times[0], end=times[-1], step=STEP)

    def of(one):
        seen = {int(at): value for at, value in one["values"]}
        return [seen.get(at, "_")[:1] for at in times]

    def growth(one, least, usual):
        seen = {int(at): float(value) for at, value in one["values"]}
        # The rules look back to before the first step, which the record lacks: until the fault, a counter does what is usual.
        calm = times[:CALM]
        grown = lambda at: str(int(seen[at] - seen[at - STEP] > least)) if at - STEP in seen and at not in calm else usual
        return [grown(at) if at in seen else "_" for at in times]

    def key(metric):
        haproxy = metric["instance"].rsplit(":")[-1][-1]
        return f"{haproxy} {metric.get('proxy', '')}/{metric.get('server') or metric.get('name', '')}"

    lines, states = [f"== {name}: {' '.join(expected) or 'none'}"], {}
    for letter, state in STATES.items():
        for one in series(f'haproxy_server_status{{{NAMES},state="{state}"}}'):
            row = states.setdefault(key(one["metric"]), ["_"] * len(times))
            for at, value in enumerate(of(one)):
                if value != "_":
                    row[at] = letter if value == "1" else row[at].replace("_", ".")
    lines += [f"status {server} {pack(row)}" for server, row in sorted(states.items())]
    for kind, (_, query, usual) in KEPT.items():
        for one in series(query):
            row = growth(one, COUNTERS[kind], usual) if kind in COUNTERS else of(one)
            if set(row) - {"_"} != {usual}:
                lines.append(f"{kind} {key(one['metric'])} {pack(row)}")
    return lines


def series_of(lines):
    """The series of the recorded lines in promtool's notation, and their length."""
    series, length, servers, given = [], 0, [], set()

    def add(metric, labels, values):
        labels = ",".join(f'{name}="{value}"' for name, value in labels.items())
        values = " ".join("stale" if value == "_" else value for value in values)
        series.append(f"      - {{series: '{metric}{{{labels}}}', values: '{values}'}}")

    for line in lines:
        kind, haproxy, name, *words = line.split(" ")
        proxy, server = name.split("/")
        row = unpack(words)
        length = max(length, len(row))
        if kind in COUNTERS:
            grown = accumulate(int(value == "1") * GAIN for value in row)
            row = ["_" if value == "_" else str(total) for value, total in zip(row, grown)]
        given.add((kind, haproxy, name))
        labels = {"instance": f"lb:840{haproxy}", "scope": "demo", "proxy": proxy, "server": server}
        if kind == "status":
            servers.append((haproxy, name, labels))
            for letter, state in STATES.items():
                add("haproxy_server_status", labels | {"state": state}, ["_" if value == "_" else str(int(value == letter)) for value in row])
        elif kind in ("primary", "dcs"):
            add(KEPT[kind][0], {"instance": f"{server}:8008", "scope": "demo", "name": server}, row)
        elif kind == "up":
            add("up", {"instance": labels["instance"], "scope": "demo", "job": "haproxy"}, row)
        else:
            labels |= {"state": "L7OK"} if kind == "agent" else {}
            add(KEPT[kind][0], labels, row)
    for haproxy, name, labels in servers:
        for kind in "weight", "answers", "lost", "held", "agent":
            # Servers of the pool `agents` have no agent check, and only HAProxy 3.2 exports the checks' results.
            asked = not name.startswith("agents/") and (kind != "agent" or haproxy == "6")
            if (kind == "weight" or asked) and (kind, haproxy, name) not in given:
                add(KEPT[kind][0], labels | ({"state": "L7OK"} if kind == "agent" else {}), KEPT[kind][2] * length)
    return series, length


def format_test(fault, lines):
    """A test for promtool: the rules must raise the fault's alerts and no others, and in time."""
    name, expected = fault
    series, length = series_of(lines)
    words = [f"  - interval: {STEP}s", f"    name: {json.dumps(name)}", "    input_series:", *series, "    promql_expr_test:"]
    by = lambda limit: sorted(alert for alert, second in expected.items() if second <= limit)
    due = [(CALM * STEP + SOON + second, by(second), f',alertname=~"{"|".join(by(second))}"') for second in set(expected.values())]
    for end, raised, only in [(length * STEP, sorted(expected), ""), *due]:
        fired = f'group by (alertname) (present_over_time(ALERTS{{alertstate="firing"{only}}}[{end}s]))'
        samples = ", ".join(f"{{labels: '{{alertname=\"{alert}\"}}', value: 1}}" for alert in raised)
        words += [f"      - expr: '{fired}'", f"        eval_time: {end}s", f"        exp_samples: [{samples}]"]
    return words


def parse_recorded(text):
    """Parses recorded lines into [((fault, {alert: seconds until its part of the fault}), lines)]."""
    faults = []
    for line in text.splitlines():
        if line.startswith("== "):
            name, expected = line[3:].rsplit(": ", 1)
            alerts = {} if expected == "none" else dict(alert.partition("+")[::2] for alert in expected.split())
            faults.append(((name, {alert: int(second or 0) for alert, second in alerts.items()}), []))
        elif line and not line.startswith("#"):
            faults[-1][1].append(line)
    return faults


def run_promtool(file):
    """Whether promtool's tests in the file pass. Prints why not."""
    done = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True)
    if done.returncode:
        print((done.stdout + done.stderr)[-8000:])
    return done.returncode == 0


def replay(faults):
    """Whether the rules raise each fault's alerts from the recorded lines, and in time."""
    with tempfile.NamedTemporaryFile("w", suffix=".yml") as test, tempfile.NamedTemporaryFile("w", suffix=".yml") as rules:
        rules.write(RULES.read_text().replace(HOURS, HALF_A_MINUTE))
        rules.flush()
        head = [f"rule_files: [{rules.name}]", f"evaluation_interval: {STEP}s", "tests:"]
        test.write("\n".join([*head, *(line for fault in faults for line in format_test(*fault)), ""]))
        test.flush()
        return run_promtool(test.name)


def main():
    """Tries the rules without a site, on the recorded faults and on hand-written series. Each alert must be raised
    there, and must be in the runbook."""
    faults = [fault for file in sorted(DATA.glob("*.txt")) for fault in parse_recorded(file.read_text())]
    done = [replay(faults), run_promtool(BY_HAND)]
    rules = set(re.findall(r"- alert: (\w+)", RULES.read_text()))
    tried = {alert for (_, expected), _ in faults for alert in expected}
    tried |= set(re.findall(r"alertname=\"(\w+)\"", BY_HAND.read_text()))
    runbook = set(re.findall(r"^\| (Postgres\w+) \|", MANUAL.read_text(), re.MULTILINE))
    for words, odd in ("is raised nowhere", rules - tried), ("is not in the runbook", rules - runbook), ("is no alert", runbook - rules):
        done += [not odd]
        print(*(f"{alert} {words}" for alert in sorted(odd)), sep="\n", end="")
    print(f"{len(rules)} alerts, {len(faults)} recorded faults")
    return 0 if all(done) and faults else 1


if __name__ == "__main__":
    sys.exit(main())
