"""How much there is, per package: lines of code, of docstrings and comments, and blank ones."""

from __future__ import annotations

import io
import subprocess
import tokenize
from collections import Counter
from pathlib import Path

PRODUCT = ("kvstore", "server", "connectors", "native")
OTHER = ("benchmarks", "examples", "simulate", "tests")
VENDORED = "native/xxhash/"
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
           tokenize.ENCODING, tokenize.ENDMARKER}  # fmt: skip
COLUMNS = ("code", "words", "blank")


def python(text: str) -> Counter[str]:
    """A line counts as code if any of it is; strings that stand alone are docstrings."""
    code: set[int] = set()
    words: set[int] = set()
    begins = True
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        lines = range(token.start[0], token.end[0] + 1)
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and begins):
            words.update(lines)
        elif token.type not in NO_CODE:
            code.update(lines)
        if token.type not in (tokenize.COMMENT, tokenize.NL):
            begins = token.type in NO_CODE
    return counted(len(text.splitlines()), code, words)


def cpp(text: str) -> Counter[str]:
    lines = [line.strip() for line in text.splitlines()]
    words = {n for n, line in enumerate(lines) if line.startswith(("//", "/*", "*"))}
    code = {n for n, line in enumerate(lines) if line} - words
    return counted(len(lines), code, words)


def counted(total: int, code: set[int], words: set[int]) -> Counter[str]:
    words = words - code
    return Counter(code=len(code), words=len(words), blank=total - len(code) - len(words))


def package(path: Path) -> str:
    """The folder below a top folder, with all that is in it; the top folder for its own files."""
    return "/".join(path.parts[: 2 if len(path.parts) > 2 else 1])


def main() -> None:
    sizes: dict[str, Counter[str]] = {}
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        path = Path(name)
        if path.parts[0] not in PRODUCT + OTHER or name.startswith(VENDORED) or not path.is_file():
            continue
        count = {".py": python, ".cpp": cpp, ".hpp": cpp, ".h": cpp}.get(path.suffix)
        if count is not None:
            sizes.setdefault(package(path), Counter()).update(count(path.read_text()))
    print(f"{'':26}" + "".join(f"{column:>8}" for column in (*COLUMNS, "lines")))
    for tops, title in ((PRODUCT, "product"), (OTHER, "tests and benchmarks")):
        rows = {name: size for name, size in sizes.items() if name.split("/")[0] in tops}
        rows = dict(sorted(rows.items())) | {title: sum(rows.values(), Counter())}
        for name, size in rows.items():
            numbers = (*(size[column] for column in COLUMNS), size.total())
            print(f"{name:26}" + "".join(f"{number:8,}" for number in numbers))
        print()


if __name__ == "__main__":
    main()
