"""The Markdown pages: links and anchors resolve as on GitHub, and what they list is there."""

import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import PurePosixPath
from posixpath import normpath

import pytest

from swa_backend.metrics import ENGINE_SCRAPED, METRICS, OPTIONS_INFO
from swa_backend.options import OPTION_KEYS, SWAOptions
from tests.helpers.paths import ROOT

MAX_README_LINES = 220
# What a page shows and GitHub does not read as Markdown: fenced blocks, then code within a line.
FENCE = re.compile(r"^ *(`{3,}|~{3,})[^\n]*\n.*?^ *\1[`~]*[ \t]*$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
HEADING = re.compile(r"^ {0,3}#{1,6}[ \t]+(.*?)[ \t]*#*[ \t]*$", re.MULTILINE)
INLINE_LINK = re.compile(r"\]\(\s*(<[^>]*>|[^\s()]*)(?:\s+(?:\"[^\"]*\"|'[^']*'))?\s*\)")
REFERENCE = re.compile(r"^ {0,3}\[[^\]]+\]:\s*(\S+)", re.MULTILINE)
HTML_LINK = re.compile(r"<(?:a|img)\b[^>]*?\b(?:href|src)=[\"']([^\"']*)[\"']", re.IGNORECASE)
HTML_ANCHOR = re.compile(r"<\w+\b[^>]*?\b(?:id|name)=[\"']([^\"']*)[\"']", re.IGNORECASE)
EXTERNAL = re.compile(r"[a-z][a-z0-9+.-]*:|//", re.IGNORECASE)
LINE_ANCHOR = re.compile(r"L\d+(C\d+)?(-L\d+(C\d+)?)?")
TEST_FILE = re.compile(r"\btest_\w+\.py\b")
SCRIPT = re.compile(r"(?:bash|python) ((?:examples|tests)/\S+\.(?:sh|py))\b")


@cache
def tree() -> dict[str, str | None]:
    """Files that a commit of this tree would have, and the text of the pages among them."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    names = [name for name in listed.split("\0") if name and (ROOT / name).exists()]
    return {n: (ROOT / n).read_text() if n.endswith(".md") else None for n in names}


def page(name: str) -> str:
    """Text of one page."""
    return tree()[name] or ""


def pages() -> list[str]:
    """Paths of all Markdown pages."""
    return sorted(name for name, text in tree().items() if text is not None)


def broken_links(source: str, files: Mapping[str, str | None]) -> list[str]:
    """Links of one page that lead nowhere, each with the reason.

    Args:
        source: path of the page, a key of ``files``.
        files: every file of the repository; of pages also the text.
    """
    found = []
    for target in links(files[source] or ""):
        if EXTERNAL.match(target):
            continue
        path, _, anchor = target.partition("#")
        if path.startswith("/"):
            name = normpath(path.lstrip("/"))
        else:
            name = normpath(str(PurePosixPath(source).parent / path)) if path else source
        if name not in files and not _is_directory(name, files):
            found.append(f"{target}: there is no {name}")
        elif anchor and not _has_anchor(name, anchor, files):
            found.append(f"{target}: {name} has no heading #{anchor}")
    return found


def links(text: str) -> Iterator[str]:
    """Targets of a page's links and images."""
    text = CODE.sub("", FENCE.sub("", text))
    for pattern in (INLINE_LINK, REFERENCE, HTML_LINK):
        for target in pattern.findall(text):
            yield target.strip("<>")


def anchors(text: str) -> set[str]:
    """Anchors of a page: one a heading, a repeated one numbered; and those that HTML gives."""
    text = FENCE.sub("", text)
    seen = Counter[str]()
    found = set(HTML_ANCHOR.findall(CODE.sub("", text)))
    for heading in HEADING.findall(text):
        slug = slug_of(heading)
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def slug_of(heading: str) -> str:
    """GitHub's anchor of a heading: lower case, no punctuation, a dash for each space."""
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", heading)
    text = re.sub(r"\[([^\]]*)\](?:\([^)]*\)|\[[^\]]*\])", r"\1", text)
    parts = re.split(r"(`[^`]*`)", text)
    text = "".join(p if p[:1] == "`" else re.sub(r"(?<!\w)_(.+?)_(?!\w)", r"\1", p) for p in parts)
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


def section(text: str, heading: str) -> str:
    """What stands under a heading of the second level."""
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def rooms(text: str) -> set[str]:
    """Files that the tables of rooms name; the folder of a table opens a line before it."""
    found, base = set[str](), ""
    for line in section(text, "Rooms").splitlines():
        if folder := re.match(r"`(plugins/[\w/]+)/`", line):
            base = folder[1]
        cells = line.split("|")
        if len(cells) == 5:
            room = "".join(re.findall(r"`([\w/]+)/`", cells[1]))
            names = re.findall(r"`(\w+\.py)`", cells[3])
            found |= {normpath(f"{base}/{room}/{name}") for name in names}
    return found


def _is_directory(name: str, files: Mapping[str, str | None]) -> bool:
    return name == "." or any(file.startswith(f"{name}/") for file in files)


def _has_anchor(name: str, anchor: str, files: Mapping[str, str | None]) -> bool:
    if name not in files:  # GitHub shows a directory's README beneath its files
        name = normpath(f"{name}/README.md")
    text = files.get(name)
    if text is None:
        return name in files and LINE_ANCHOR.fullmatch(anchor) is not None
    return anchor in anchors(text)


@pytest.mark.parametrize("name", pages())
def test_links_of_a_page_resolve(name: str) -> None:
    assert broken_links(name, tree()) == []


@pytest.mark.parametrize("name", pages())
def test_tests_and_scripts_that_a_page_names_are_there(name: str) -> None:
    text = page(name)
    if name == "tests/plugin/upstream/README.md":  # its first column names vLLM's own tests
        text = "\n".join(line[56:] for line in text.splitlines())
    tests = {path.rpartition("/")[2] for path in tree() if path.startswith("tests/")}
    assert set(TEST_FILE.findall(text)) <= tests
    assert set(SCRIPT.findall(text)) <= set(tree())


def test_readme_has_every_option_with_its_default() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \|.*?\| ([^|]*) \| [^|]* \|$", section(page("README.md"), "Options"), re.M
    )
    told = {key: default.strip('`"') for key, default in rows}
    assert tuple(sorted(told)) == tuple(sorted(OPTION_KEYS))
    for key, default in told.items():
        value = getattr(SWAOptions(), key)
        assert default == ("the checkpoint's" if value is None else str(value).lower()), key


def test_page_of_the_plugin_has_every_metric() -> None:
    told = re.findall(
        r"`(swa_\w+)(?:\{.*?\})?`", section(page("plugins/README.md"), "Log and metrics")
    )
    served = {metric.sample for metric in (*METRICS.values(), ENGINE_SCRAPED, OPTIONS_INFO)}
    assert {name for name in told if name != "swa_vllm"} == served


def test_page_of_the_plugin_names_every_file_in_its_room() -> None:
    there = {name for name in tree() if name.startswith("plugins/") and name.endswith(".py")}
    entrance = "plugins/swa_vllm/__init__.py"  # the others hold a sentence alone
    named = {name for name in there if name == entrance or "__init__" not in name}
    assert rooms(page("plugins/README.md")) == named


def test_page_of_the_backend_names_every_file_and_room() -> None:
    there = [PurePosixPath(name) for name in tree() if re.match(r"swa_backend/.*\.py$", name)]
    files = {path.name for path in there if path.name != "__init__.py"}
    folders = {f"{path.parent.name}/" for path in there if len(path.parts) > 2}
    told = re.findall(r"`([\w/]+(?:\.py|/))`", section(page("swa_backend/README.md"), "Files"))
    assert set(told) - {"__init__.py"} == files | folders


def test_readme_is_a_page_and_not_a_book() -> None:
    assert len(page("README.md").splitlines()) <= MAX_README_LINES


FILES = {
    "README.md": None,
    "a/page.md": "# Title\n\n## Twice\n\n## Twice\n\n<a name='by-hand'></a>\n",
    "a/picture.png": None,
    "a/README.md": "## In a directory\n",
    "code.py": None,
}


@pytest.mark.parametrize(
    "link",
    [
        "[x](a/page.md)",
        "[x](a/page.md#twice-1)",
        "[x](a/page.md#by-hand)",
        "[over\ntwo lines](a)",
        "[x](a/#in-a-directory)",
        "[x](/a/page.md 'a title')",
        "![x](a/picture.png)",
        "[![x](a/picture.png)](a/page.md)",
        "[x]\n\n[x]: a/page.md#title",
        '<img src="a/picture.png">',
        "[x](#here)",
        "[x](code.py#L3)",
        "[x](https://example.org/missing.md#no)",
        "[x](mailto:nobody@example.org)",
        "`[x](missing.md)`",
        "``a ` [x](missing.md)``",
        "```\n[x](missing.md)\n```",
        "~~~text\n[x](missing.md)\n~~~",
    ],
)
def test_link_is_good(link: str) -> None:
    assert broken_links("README.md", {**FILES, "README.md": f"# Here\n\n{link}\n"}) == []


@pytest.mark.parametrize(
    "link",
    [
        "[x](missing.md)",
        "[x](a/Page.md)",
        "[x](a/page)",
        "[x](../README.md)",
        "[x](a/page.md#thrice)",
        "[x](a/page.md#twice-2)",
        "[x](a/page.md#Title)",
        "[over\ntwo lines](missing)",
        "[x](<missing file.md>)",
        "[x](missing.md 'a title')",
        "![x](a/missing.png)",
        "[![x](a/missing.png)](a/page.md)",
        "[x]\n\n[x]: missing.md",
        '<img src="missing.png">',
        "[x](#there)",
        "[x](code.py#here)",
        "[x](a/#here)",
        "```\ncode\n```\n[x](missing.md)\n```\ncode\n```",
        "`code` [x](missing.md) `code`",
    ],
)
def test_link_is_broken(link: str) -> None:
    assert len(broken_links("README.md", {**FILES, "README.md": f"# Here\n\n{link}\n"})) == 1


def test_link_is_relative_to_its_page() -> None:
    files = {**FILES, "a/page.md": "[x](../code.py) [x](picture.png) [x](code.py)"}
    assert broken_links("a/page.md", files) == ["code.py: there is no a/code.py"]


@pytest.mark.parametrize(
    ("heading", "slug"),
    [
        ("What a window means", "what-a-window-means"),
        ("Plan, check, trace", "plan-check-trace"),
        ("`swa plan`: one model", "swa-plan-one-model"),
        ("On several machines, with GPUs (H100)", "on-several-machines-with-gpus-h100"),
        ("A_b and _c_ - d", "a_b-and-c---d"),
        ("The [link](x.md) in it", "the-link-in-it"),
        ("`swa_backend/ops/`", "swa_backendops"),
        ("Größe 1.5", "größe-15"),
    ],
)
def test_slug_is_githubs(heading: str, slug: str) -> None:
    assert slug_of(heading) == slug


def test_headings_in_code_have_no_anchor() -> None:
    assert anchors("# One\n\n```bash\n# two\n```\n\n### Three ###\n") == {"one", "three"}
