#!/usr/bin/env python3
"""Checks the documents: each link has a target, a test runs each command, and each figure is in a file.

  tests/documents.py              in the repository
  tests/documents.py FOLDER...    in each of these folders, which has what the packages of one kind install

A comment stands before each block:

  <!-- run: FILE... -->      these files read the document, or have every line of the block
  <!-- from: FILE... -->     usage or configuration: these files have every word of it
  <!-- not run: REASON -->

Before a paragraph or a table with measured figures, in README.md and docs, stands one of these:

  <!-- figures: FILE... -->            each of its numbers is in these files, or one that rounds to it
  <!-- figures not compared: REASON -->"""

import collections
import decimal
import fnmatch
import gzip
import os
import pathlib
import re
import subprocess
import sys
import urllib.parse

BLOCK = re.compile(
    r"(?:^ *<!-- (?P<verb>run|from|not run): (?P<by>[^\n]+) -->\n+)?"
    r"(?:^ *```[^\n]*\n(?P<fenced>.*?)^ *```$|(?<=\n\n)(?P<indented>(?: {4}[^\n]+\n|\n(?= *\n* {4}))+))",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"\]\(<?([^)\s>]+)|^ *\[[^\]]+\]: *(\S+)|\b(?:src|href)=\"([^\"]+)\"", re.MULTILINE)
CODE = re.compile(r"`((?:(?!\n\n)[^`])+)`")
NUMBER = re.compile(r"(?<![\w.])\d+(?:[,_]\d{3})*(?:\.\d+)?")
# A measured figure looks like one of these; 2s, 500ms and `90` are settings.
FIGURE = re.compile(
    r"\d\.\d+ (?:to [\d.]+ )?(?:s|ms|MB|MiB)\b|\d %|\b\d+,\d{3}\b|\d \([\d.]+\)|\d of \d|\d times (?:the|as)\b"
)
# a document, and perhaps a heading in it: "Who may ask" in security.md
NAME = re.compile(
    r"(?:([\"'])((?:(?!\1).)+)\1 in )?(?<![\w./$-])([\w./-]*\w\.md)\b"
    r"(?!(?:` and `[^`]+)?`?\s+in\s+the\s+sources)"
)
PATH = re.compile(r"(?<![\w/.$-])/(?:usr/share|usr/lib|etc)/[\w./@*\\-]*\w")
# Paths that installed texts name but no package installs, and whose they are
ELSEWHERE = {
    "/etc/(hosts|passwd)": "the machine's",
    "/etc/(default|sysconfig)/haproxy|/etc/haproxy/": "HAProxy's",
    "/etc/patroni/": "Patroni's",
    "/usr/share/common-licenses/": "Debian's",
    "/etc/systemd/system": "the administrator's units and drop-ins",
    "/etc/(sysusers|tmpfiles).d": "an installation by hand",
    "/etc/(default|tmpfiles.d)/patroni-agent-check-2": "a second Patroni",
    "/etc/default/patroni-agent-check.new": "settings that are tried first",
    "/etc/xinetd.d/": "the administrator's copy of an example",
    "/etc/patroni-agent-check-hold": "a hold that the administrator lets survive reboots",
}


class Document:
    """One file in Markdown."""

    def __init__(self, path, text):
        self.path, self.blocks, self.anchors, seen = path, [], set(), collections.Counter()
        prose = text
        for block in BLOCK.finditer(text):
            before, found = prose[: block.start()], block["fenced"] or block["indented"]
            heading = (re.findall(r"^#+ (.+)$", before, re.MULTILINE) or [""])[-1]
            self.blocks.append((before.count("\n") + 1, heading, block["verb"], block["by"], found.splitlines()))
            prose = before + re.sub(r"[^\n]", " ", block[0]) + prose[block.end() :]
        for heading in re.findall(r"^#+ (.+)$", prose, re.MULTILINE):
            anchor = anchor_of(heading)
            self.anchors.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
            seen[anchor] += 1
        self.prose, self.code = CODE.sub("", prose), CODE.findall(prose)


def anchor_of(heading):
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


class Tree:
    """A folder's files, and what is wrong in them."""

    def __init__(self, folder, files):
        self.folder, self.wrong = folder, []
        self.files = set(files)
        self.names = self.files | {str(parent) for file in files for parent in pathlib.PurePath(file).parents}
        self.documents = {file: Document(file, self.read(file)) for file in sorted(files) if file.endswith(".md")}

    def read(self, file):
        read = (gzip.open if file.endswith(".gz") else open)(os.path.join(self.folder, file), "rb").read()
        return read.decode(errors="replace")

    def check_links(self):
        for document in self.documents.values():
            for targets in LINK.findall(document.prose):
                self.check_link(document, "".join(targets))
            defined = set(re.findall(r"^ *\[([^\]]+)\]: ", document.prose, re.MULTILINE))
            for name in set(re.findall(r"\]\[([^\]]+)\]", document.prose)) - defined:
                self.say(document.path, f"[{name}] is defined nowhere")

    def check_link(self, document, target):
        if ":" in target.split("/")[0]:
            if not re.match(r"https://[a-z][\w-]*(\.[\w-]+)+(/|$)", target):
                self.say(document.path, f"{target}: write a relative link or https://")
            return
        path, _, anchor = target.partition("#")
        path = os.path.join(os.path.dirname(document.path), urllib.parse.unquote(path)) if path else document.path
        path = os.path.relpath(os.path.realpath(os.path.join(self.folder, path)), os.path.realpath(self.folder))
        if path not in self.names:
            self.say(document.path, f"{target} leads to no file")
        elif anchor and anchor not in getattr(self.documents.get(path), "anchors", ()):
            self.say(document.path, f"{target} leads to no heading")

    def check_named_documents(self, file, text):
        """The documents that a text names, and the headings."""
        if "changelog" in file.lower():
            return  # it names what was there
        for _, heading, name in NAME.findall(text):
            ending = re.sub(r"^[./]*(usr/share/doc/[^/]+)?", "", name).lstrip("/")
            documents = [there for path, there in self.documents.items() if f"/{path}".endswith(f"/{ending}")]
            if not documents:
                self.say(file, f"{name} is not there")
            elif heading and not any(anchor_of(heading) in document.anchors for document in documents):
                self.say(file, f"there is no {heading!r} in {name}")

    def say(self, file, what):
        self.wrong.append(f"{file}: {what}")


class Repository(Tree):
    def __init__(self):
        super().__init__(".", subprocess.check_output(["git", "ls-files"], text=True).splitlines())

    def check(self):
        self.check_links()
        for document in self.documents.values():
            self.check_paths(document)
            self.check_blocks(document)
            self.check_figures(document)
        for file in self.files - self.documents.keys() - {"tests/documents.py"}:
            self.check_named_documents(file, self.read(file).replace("\\-", "-"))

    def check_paths(self, document):
        """Paths in `code`, in the repository or in the document's folder."""
        here = os.path.dirname(document.path)
        for code in document.code:
            name = code.split()[0].rstrip("/")
            first, *rest = name.split("/")
            folders = [folder for folder in ("", here) if first and rest and os.path.join(folder, first) in self.names]
            if folders and not any(fnmatch.filter(self.names, os.path.join(folder, name)) for folder in folders):
                self.say(document.path, f"`{name}` is not there")

    def check_blocks(self, document):
        for line, heading, verb, by, lines in document.blocks:
            where = f"{document.path}:{line}"
            if not verb:
                self.say(where, "who runs this block? <!-- run: FILE -->, or <!-- not run: REASON -->")
            elif verb != "not run":
                self.check_block(where, document, heading, verb, by.split(), lines)
        for mark in re.findall(r"<!-- (?:run|from|not run):.*", document.prose):
            self.say(document.path, f"there is no block after {mark}")

    def check_block(self, where, document, heading, verb, files, lines):
        if missing := set(files) - self.files:
            return self.say(where, f"{missing} is not there")
        steps = self.read("tests/run")
        for file in files if verb == "run" else ():
            if os.path.dirname(file) not in steps and not file.startswith(".github/"):
                self.say(where, f"tests/run runs no {file}")
        texts = [self.read(file) for file in files]
        if verb == "run" and any(document.path in text and f'"{heading}"' in text for text in texts):
            return
        there = "\n".join(map(normalize, texts))
        for line in lines:
            line = normalize(re.sub(r"^\$ |(?:^|\s\s)#.*$", "", line.strip()))
            words = [word.strip("[]") for word in line.split() if re.search("[a-z]{2}", word)]
            for part in [line] if verb == "run" else words:
                if part not in there:
                    self.say(where, f"{' '.join(files)} has no {part}")

    def check_figures(self, document):
        shown = re.match(r"README\.md|docs/(?!development/)", document.path)
        for part in re.split(r"\n\n(?!(?<=-->\n\n))", document.prose):
            mark = re.match(r"\n*<!-- figures(: | not compared: )(.+) -->\n", part)
            part = re.sub(r"\]\([^)]*\)", "", part[mark.end() if mark else 0 :])
            if mark and mark[1] == ": ":
                self.compare_figures(document, mark[2].split(), part)
            elif not mark and shown and (found := FIGURE.search(part)):
                what = "<!-- figures: FILE -->, or <!-- figures not compared: REASON -->"
                self.say(document.path, f"which file has {found[0]!r}? {what}")

    def compare_figures(self, document, files, part):
        if missing := set(files) - self.files:
            return self.say(document.path, f"{missing} is not there")
        there = {number for file in files for number in find_numbers(self.read(file))}
        for number in find_numbers(part):
            if not any(rounds_to(other, number) for other in there):
                self.say(document.path, f"the figure {number} is not in {' '.join(files)}")


def normalize(text):
    """A command as a shell or a string of another language may have it."""
    return re.sub(r"\s+", " ", re.sub(r"[\\\"']", "", text)).strip()


def find_numbers(text):
    return [decimal.Decimal(re.sub("[,_]", "", number)) for number in NUMBER.findall(text)]


def rounds_to(number, end):
    return number == end or number.quantize(end, decimal.ROUND_HALF_UP) == end and end.as_tuple().exponent < 0


class Installed(Tree):
    def __init__(self, folder):
        files = [path for path in pathlib.Path(folder).rglob("*") if not path.is_dir()]
        super().__init__(folder, [str(path.relative_to(folder)) for path in files])

    def check(self, files, folders, excused):
        """Compares with all files and folders that any package installs; adds what none does to `excused`."""
        self.check_links()
        for file in self.files:
            # without a manual's fonts and escapes, and a document's comments
            text = re.sub(r"\\f.|\\(?=-)|<!--.*-->", "", self.read(file))
            program = "\0" in text
            for name, section in set(re.findall(r"\b(patroni-[a-z-]+) ?\((\d)\)", text)):
                if not any(re.search(rf"/man{section}/{name}\.{section}(\.gz)?$", path) for path in files):
                    self.say(file, f"there is no manual {name}({section})")
            for path in set(PATH.findall(text)):
                known = path in files | folders
                # in a program, the next string follows without a gap, and libraries name paths as well
                known |= program and ("/patroni-" not in path or path.startswith(tuple(files)))
                excuses = [pattern for pattern in ELSEWHERE if re.match(pattern, path)]
                excused.update(excuses if not known else ())
                if not known and not excuses:
                    self.say(file, f"{path} is installed nowhere")
            if not program:
                self.check_named_documents(file, text)


def main():
    trees = [Installed(folder) for folder in sys.argv[1:]]
    files = {f"/{file}" for tree in trees for file in tree.files}
    folders, excused = {f"/{name}" for tree in trees for name in tree.names} - files, set()
    for tree in trees:
        tree.check(files, folders, excused)
    wrong = [f"{tree.folder}/{line}" for tree in trees for line in tree.wrong]
    wrong += [f"nothing names {pattern} any more" for pattern in ELSEWHERE.keys() - excused if trees]
    if not trees:
        repository = Repository()
        repository.check()
        wrong = repository.wrong
    sys.exit("\n".join(sorted(wrong)) or None)


main()
