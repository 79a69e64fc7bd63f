"""The plan of the house: which file may import which, how long things may get, who owns what.

Everything is read from the sources, nothing is imported. A rule is a function from sources to
complaints. It is held against the files, which must give none, and against a few lines that break
it, which must give one.

If a rule stands in the way of something good, change the table here, and say why in the commit.
"""

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent

# Files in the order of their arrows: each imports only files above it, so there is no circle.
# file: (most lines, the files of ours that it imports)
ALGORITHM = {  # the chapters, and what they stand on
    "config": (352, ""),
    "files": (80, ""),
    "families": (276, "config"),
    "device": (155, ""),
    "cpu_linear": (60, ""),
    "kernels": (135, "cpu_linear"),
    "cpu_attention": (90, ""),
    "exact": (160, "kernels"),
    "kv_cache": (450, "cpu_attention exact kernels"),
    "model": (409, "config cpu_attention exact kernels kv_cache"),
    "parallel": (345, "config device model"),  # applied from outside; no chapter needs it
    "quantize": (232, "config kernels model"),
    "sampling": (330, ""),
    "batch": (295, "sampling"),
    "policies": (240, "batch kv_cache quantize"),
    "selection": (150, "kernels kv_cache model policies"),
    "lookup": (50, ""),
    "drafter": (235, "batch kv_cache model policies quantize"),
    "draft_models": (170, "config drafter kv_cache model policies selection"),
    "drafters": (
        240,
        "config draft_models drafter kernels kv_cache lookup model policies quantize selection",
    ),
    "graphs": (110, "batch"),
    "spec_decode": (
        450,
        "batch config device drafter drafters exact graphs kv_cache model policies quantize"
        " sampling",
    ),
}
ECONOMICS = {
    "roofline": (295, "config"),
    "acceptance": (100, "config"),
    "picture": (250, ""),
    "cost_model": (450, "acceptance config families files picture roofline"),
    "capacity": (130, "config cost_model roofline"),
    "forecast": (192, ""),
    "auto": (444, "device drafter forecast model parallel policies roofline spec_decode"),
    "refill": (260, "auto batch device sampling spec_decode"),
}
IN_AND_OUT = {
    "tokenizer": (446, "config"),
    "chat": (260, "config tokenizer"),
    "prompts": (140, "tokenizer"),
    "checkpoint": (352, "chat config device families model parallel tokenizer"),
    "offline": (350, "batch checkpoint prompts sampling tokenizer"),
    "results": (220, "checkpoint config device offline parallel"),
    "data_parallel": (145, "offline results"),
}
PROGRAM = {
    "report": (385, ""),
    "measure": (260, "auto config device kv_cache report sampling spec_decode"),
    "options": (275, "checkpoint config cost_model drafters files policies quantize sampling"),
    "load": (
        228,
        "auto batch checkpoint config device drafters kernels measure model options parallel"
        " policies prompts quantize roofline sampling spec_decode",
    ),
    "serve": (
        310,
        "auto batch data_parallel device load measure offline options parallel refill report"
        " results sampling spec_decode",
    ),
    "demo": (
        160,
        "auto checkpoint device drafter drafters load measure options policies quantize report"
        " sampling spec_decode tokenizer",
    ),
    "explain": (
        290,
        "auto checkpoint config draft_models drafter drafters kv_cache load lookup measure options"
        " spec_decode tokenizer",
    ),
    "generate": (250, "*"),  # everything; nobody imports it
}
TABLE = ALGORITHM | ECONOMICS | IN_AND_OUT | PROGRAM
CHAPTERS = ("cpu_linear", "kernels", "cpu_attention", "exact", "kv_cache", "model", "quantize",
            "sampling", "batch", "policies", "selection", "lookup", "drafter", "draft_models",
            "drafters", "graphs", "spec_decode")  # fmt: skip
MAX_LINES, MAX_CHAPTERS, MAX_TOTAL = 450, 3650, 10900  # of a file, of CHAPTERS, of all files
MAX_FUNCTION, MAX_PARAMETERS, MAX_EQUAL = 60, 6, 5  # lines, parameters without self, lines
WITHOUT_TORCH = ("config", "families", "files", "roofline", "acceptance", "picture",
                 "cost_model", "capacity", "report")  # fmt: skip
MANY_PARAMETERS = {  # function: why it has more
    "cpu_attention.attend": "what an operator is given are tensors and numbers, not structures",
    "spec_decode.__init__": "an engine is made of seven independent things",
}
TEXT_STATE = {  # of batch.Batch
    "tokens", "seq_len", "prompt_len", "limit", "finished", "eos", "counts", "accepted", "drafted",
    "n_rounds"
}  # fmt: skip
SHAPE = r"\[(\.{3}|\d+|[A-Z]\w*|n|dim|gamma|)([, +*-][^][]*)?\]"  # [B, T], [..., V], [2 * dim], []
REGISTRY = "drafter_class"  # the function that looks a strategy's name up in DRAFTERS
STRATEGIES = {"none", "full", "ngram", "model", "streaming", "snapkv", "chunks", "mixed"}


class Source(NamedTuple):
    """A file of Python."""

    name: str  # without .py
    text: str
    tree: ast.Module

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()


Rule = Callable[[list[Source]], Iterator[str]]


def source(name: str, text: str) -> Source:
    return Source(name, text, ast.parse(text))


def read(*folders: str) -> list[Source]:
    paths = (path for folder in folders for path in sorted((ROOT / folder).glob("*.py")))
    return [source(path.stem, path.read_text(encoding="utf-8")) for path in paths]


def nodes(source: Source, *kinds: type) -> Iterator:
    return (node for node in ast.walk(source.tree) if isinstance(node, kinds))


def imports(source: Source) -> set[str]:
    """First parts of the modules that a file imports, anywhere in it."""
    names = [a.name for node in nodes(source, ast.Import) for a in node.names]
    names += [node.module or "." for node in nodes(source, ast.ImportFrom)]
    return {name.split(".")[0] for name in names}


def functions(source: Source) -> Iterator[ast.FunctionDef]:
    return nodes(source, ast.FunctionDef, ast.AsyncFunctionDef)


def parameters(function: ast.FunctionDef) -> list[ast.arg]:
    a = function.args
    several = [arg for arg in (a.vararg, a.kwarg) if arg]
    found = [*a.posonlyargs, *a.args, *a.kwonlyargs, *several]
    return [arg for arg in found if arg.arg not in ("self", "cls")]


def own_nodes(scope: ast.AST) -> Iterator[ast.AST]:
    """What is in a function, or in a module, but not in the functions inside."""
    todo = [*ast.iter_child_nodes(scope)]
    while todo:
        node = todo.pop()
        yield node
        if not isinstance(node, ast.FunctionDef):
            todo += ast.iter_child_nodes(node)


def path(target: ast.AST) -> list[str]:
    """Names on the way to what is written: ["engine", "batch", "tokens"] of .tokens[0]."""
    names: list[str] = []
    while isinstance(target, ast.Attribute | ast.Subscript | ast.Starred | ast.Call):
        if isinstance(target, ast.Attribute):
            names.insert(0, target.attr)
        target = target.func if isinstance(target, ast.Call) else target.value
    return [target.id if isinstance(target, ast.Name) else "", *names]


def written(node: ast.AST) -> list[ast.expr]:
    """What a statement or a call writes to in place, if anything."""
    if isinstance(node, ast.Assign | ast.Delete):
        targets = [t.elts if isinstance(t, ast.Tuple | ast.List) else [t] for t in node.targets]
        return sum(targets, [])
    if isinstance(node, ast.AugAssign | ast.AnnAssign):
        return [node.target]
    if isinstance(node, ast.Call):
        f = node.func
        out = [keyword.value for keyword in node.keywords if keyword.arg == "out"]
        if isinstance(f, ast.Attribute) and re.fullmatch(r"[a-z]\w*[a-z]_", f.attr):
            out.append(f.value)  # tensor.fill_(...)
        return out
    return []


def imports_are_those_of_the_table(sources: list[Source]) -> Iterator[str]:
    ours = {source.name for source in sources}
    for source in sources:
        allowed = TABLE.get(source.name, (0, ""))[1].split()
        used = imports(source)
        for name in sorted(used & (ours | TABLE.keys() | {"tests", "benchmarks", "scripts"})):
            if name == "generate" or ("*" not in allowed and name not in allowed):
                yield f"{source.name}.py imports {name}"
        if source.name in TABLE:
            for name in sorted(set(allowed) - used - {"*"}):
                yield f"{source.name}.py may import {name} and does not: tighten the table"
        else:
            yield f"{source.name}.py is not in the table"


def files_are_short(sources: list[Source]) -> Iterator[str]:
    lengths = {source.name: len(source.lines) for source in sources}
    for name, n in lengths.items():
        most = TABLE.get(name, (MAX_LINES,))[0]
        if n > most:
            yield f"{name}.py has {n} lines, {most} at most"
    chapters = sum(lengths.get(name, 0) for name in CHAPTERS)
    for what, n, most in (
        ("the algorithm", chapters, MAX_CHAPTERS),
        ("all files", sum(lengths.values()), MAX_TOTAL),
    ):
        if n > most:
            yield f"{what}: {n} lines, {most} at most"


def functions_are_short(sources: list[Source]) -> Iterator[str]:
    for source in sources:
        for function in functions(source):
            name, n = f"{source.name}.{function.name}", len(parameters(function))
            length = function.end_lineno - function.lineno + 1
            if length > MAX_FUNCTION:
                yield f"{name} has {length} lines, {MAX_FUNCTION} at most"
            if n > MAX_PARAMETERS and name not in MANY_PARAMETERS:
                yield f"{name} has {n} parameters, {MAX_PARAMETERS} at most"


def nothing_here_imports_torch(sources: list[Source]) -> Iterator[str]:
    """Neither themselves nor through what they import."""
    arrows = {source.name: imports(source) for source in sources}
    for start in WITHOUT_TORCH:
        reached, new = set(), {start}
        while new:
            reached |= new
            new = set().union(*(arrows.get(name, ()) for name in new)) - reached
        if "torch" in reached:
            via = sorted(name for name in reached if "torch" in arrows.get(name, ()))
            yield f"{start}.py imports torch (in {', '.join(via)})"


def modules_keep_no_state(sources: list[Source]) -> Iterator[str]:
    """Lists, sets and dictionaries of a module are constants."""
    kinds = ast.Dict | ast.List | ast.Set | ast.DictComp | ast.ListComp | ast.SetComp | ast.Call
    mutators = "append extend insert update setdefault pop popitem clear add remove discard sort"
    for source in sources:
        if any(nodes(source, ast.Global)):
            yield f"{source.name}.py has a global statement"
    names = {
        target.id: source.name
        for source in sources
        for node in source.tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, kinds)
        for target in written(node)
        if isinstance(target, ast.Name)
    }
    for source in sources:
        for node in nodes(source, ast.Assign, ast.AugAssign, ast.Delete, ast.Call):
            targets = [t for t in written(node) if not isinstance(t, ast.Name)]
            if isinstance(node, ast.AugAssign):
                targets = written(node)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                targets += [node.func.value] * (node.func.attr in mutators.split())
            for name in sorted(set().union(*map(path, targets)) & names.keys()):
                yield f"{source.name}.py, line {node.lineno} writes to {names[name]}.{name}"


def ancestors(scope: ast.AST | None, classes: dict[str, ast.ClassDef]) -> list[str]:
    """Names of the classes that one derives from, as far as they are among these."""
    names = [ast.unparse(base) for base in getattr(scope, "bases", ())]
    return names + [more for name in names for more in ancestors(classes.get(name), classes)]


def tensors_have_shapes(sources: list[Source]) -> Iterator[str]:
    """In comments of the signature, in the docstring, or in the function that is overridden."""
    classes = {n.name: n for source in sources for n in nodes(source, ast.ClassDef)}
    known: set[tuple[str, str]] = set()  # (class, method), bases first
    for source in sources:
        if source.name not in CHAPTERS:
            continue
        lines = io.StringIO(source.text).readline
        tokens = [t for t in tokenize.generate_tokens(lines) if t.type == tokenize.COMMENT]
        comments = {token.start[0]: token.string for token in tokens}
        own = [n for n in source.tree.body if isinstance(n, ast.ClassDef)]
        for scope in (source.tree, *own):
            bases = ancestors(scope, classes)
            for node in scope.body:
                if isinstance(node, ast.FunctionDef):
                    hints = [arg.annotation for arg in parameters(node)] + [node.returns]
                    name, last = node.name, max(node.body[0].lineno - 1, node.lineno)
                    words = ast.get_docstring(node) or ""
                elif isinstance(node, ast.AnnAssign):
                    hints, name, last, words = [node.annotation], "", node.end_lineno, ""
                else:
                    continue
                words += "".join(comments.get(n, "") for n in range(node.lineno, last + 1))
                scoped = getattr(scope, "name", ""), name
                of_tensors = any(re.search(r"\bTensor\b", ast.unparse(h)) for h in hints if h)
                if of_tensors and re.search(SHAPE, words) or any((b, name) in known for b in bases):
                    known.add(scoped)
                elif of_tensors and not name.startswith("_"):
                    yield f"{source.name}.py, line {node.lineno}: {name} names no shape"


def public_things_say_what_they_do(sources: list[Source]) -> Iterator[str]:
    """A docstring, their own or of what they override; it names the errors that are raised."""
    classes = {n.name: n for source in sources for n in nodes(source, ast.ClassDef)}
    words: dict[tuple[str, str], str] = {}  # of (class, method)
    for source in sources:
        for scope in (source.tree, *nodes(source, ast.ClassDef)):
            kind = getattr(scope, "name", "")
            if kind and not ast.get_docstring(scope):
                yield f"{source.name}.py, line {scope.lineno}: {kind} has no docstring"
            for node in scope.body:
                if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                    continue
                own = ast.get_docstring(node) or ""
                bases = ancestors(scope, classes) if kind else []
                above = [words[base, node.name] for base in bases if (base, node.name) in words]
                words[kind, node.name] = told = " ".join([own, *above])
                raised = {
                    ast.unparse(n.exc)
                    for n in own_nodes(node)
                    if isinstance(n, ast.Raise) and n.exc
                }
                errors = [e for e in raised if re.match(r"(?!NotImplemented)[\w.]*Error", e)]
                if not told:
                    yield f"{source.name}.py, line {node.lineno}: {node.name} has no docstring"
                elif errors and "Error" not in told + (ast.get_docstring(scope) or "") * bool(kind):
                    yield f"{source.name}.py, line {node.lineno}: {node.name} raises unsaid"


def namespaces_stay_in_commands(sources: list[Source]) -> Iterator[str]:
    for source in sources:
        if source.name in ("generate", "cost_model", "capacity"):
            continue
        for node in nodes(source, ast.Name, ast.Attribute, ast.alias):
            if "Namespace" in (getattr(node, k, "") for k in ("id", "attr", "name")):
                yield f"{source.name}.py, line {node.lineno} has an argparse.Namespace"


def nothing_stands_twice(sources: list[Source]) -> Iterator[str]:
    """No more than MAX_EQUAL equal lines; blank ones and those of imports do not count."""
    seen: dict[tuple, str] = {}
    for source in sources:
        skipped = {
            n
            for node in nodes(source, ast.Import, ast.ImportFrom)
            for n in range(node.lineno, node.end_lineno + 1)
        }
        numbered = [(n, "".join(line.split())) for n, line in enumerate(source.lines, start=1)]
        kept = [(n, line) for n, line in numbered if line and n not in skipped]
        for i in range(len(kept) - MAX_EQUAL):
            window = tuple(line for _, line in kept[i : i + MAX_EQUAL + 1])
            place = f"{source.name}.py, line {kept[i][0]}"
            if seen.setdefault(window, place) != place:
                yield f"{place} repeats {seen[window]}"


def only_the_batch_writes_its_text(sources: list[Source]) -> Iterator[str]:
    """Neither its attributes nor, in place, what they hold, also under a local name.

    A class may have attributes of these names: what it assigns to itself when it is made.
    """
    for source in sources:
        if source.name == "batch":
            continue
        for scope in (source.tree, *functions(source)):
            inside, local = [*own_nodes(scope)], {}
            if isinstance(scope, ast.FunctionDef):
                local = {arg.arg: arg.arg for arg in parameters(scope)}
            for node in inside:
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute):
                    names = [t.id for t in node.targets if isinstance(t, ast.Name)]
                    local |= dict.fromkeys(names, node.value.attr)
            for node in inside:
                for target in written(node):
                    root, *rest = path(target)
                    if not isinstance(target, ast.Name) or isinstance(
                        node, ast.AugAssign | ast.Call
                    ):
                        rest.append(local.get(root, ""))
                    names = TEXT_STATE.intersection(rest)
                    made = root == "self" and getattr(scope, "name", "") == "__init__"
                    if names and (isinstance(node, ast.Call) or not made):
                        yield f"{source.name}.py, line {node.lineno} writes {', '.join(names)}"


def reports_know_no_drafters(sources: list[Source]) -> Iterator[str]:
    for source in sources:
        if source.name in ("measure", "report"):
            for node in nodes(source, ast.Name, ast.Attribute, ast.alias):
                for key in ("id", "attr", "name"):
                    if re.fullmatch(r"\w*Drafter", getattr(node, key, "")):
                        yield f"{source.name}.py, line {node.lineno} knows {getattr(node, key)}"


def strategies_are_not_compared(sources: list[Source]) -> Iterator[str]:
    """A strategy's name is compared in the classes of strategies and in the command only."""
    for source in sources:
        for part in source.tree.body:
            place = source.name, getattr(part, "name", "")
            if place[0] in ("options", "generate") or place[1] == "Strategy":
                continue
            if place[0] == "drafters" and (isinstance(part, ast.ClassDef) or place[1] == REGISTRY):
                continue
            for node in ast.walk(part):
                if isinstance(node, ast.Compare | ast.MatchValue):
                    values = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
                    for name in sorted(STRATEGIES.intersection(values)):
                        yield f"{source.name}.py, line {node.lineno} compares with {name!r}"


def test_the_table_goes_one_way():
    above: list[str] = []
    for name, (most, allowed) in TABLE.items():
        assert set(allowed.split()) <= {*above, "*"}, f"{name} imports a file that is not above it"
        assert most <= MAX_LINES
        above.append(name)


OUTSIDE = read("benchmarks", "scripts")
HOUSE = sorted(read("."), key=lambda source: [*TABLE, source.name].index(source.name))
LONG = "def f():\n" + "    pass\n" * 60
SIX = "a = 1\nb = 2\nc = 3\n\nd = 4\ne = 5\nf = 6\n"
STATE = "KEPT = {}\ndef f():\n    "
# rule: the files that must keep it; and by complaint, sources that break it
RULES: dict[Rule, tuple[list[Source], dict[str, dict[str, str]]]] = {
    imports_are_those_of_the_table: (HOUSE, {
        "kv_cache.py imports model": {"kv_cache": "import model"},
        "policies.py imports config": {"policies": "def f():\n    from config import b"},
        "policies.py may import kv_cache and does not": {"policies": "import torch"},
        "measure.py imports generate": {"measure": "import generate.x"},
        "batch.py imports benchmarks": {"batch": "import os, benchmarks.floor"},
        "utils.py is not in the table": {"utils": ""},
    }),
    files_are_short: (HOUSE, {
        f"batch.py has {TABLE['batch'][0] + 1} lines": {"batch": "\n" * (TABLE["batch"][0] + 1)},
        "a.py has 451 lines": {"a": "\n" * 451},
        "the algorithm: 3651": {"kv_cache": "\n" * 2000, "graphs": "\n" * 1651, "auto": "\n" * 9},
        f"all files: {MAX_TOTAL + 1}": {"a": "\n" * 4000, "b": "\n" * (MAX_TOTAL - 3999)},
    }),
    functions_are_short: (HOUSE, {
        "a.f has 61 lines": {"a": LONG},
        "a.f has 7 parameters": {"a": "class A:\n    def f(self, a, b, /, c, *d, e, f=1, **g): 0"},
    }),
    nothing_here_imports_torch: (HOUSE, {
        "config.py imports torch": {"config": "import torch.nn"},
        "report.py imports torch (in b)": {"report": "def f():\n    import a", "a": "import b",
                                           "b": "from torch import Tensor"},
    }),
    modules_keep_no_state: (HOUSE + OUTSIDE, {
        "a.py, line 3 writes to a.KEPT": {"a": STATE + "KEPT[1] = 2"},
        "a.py, line 3": {"a": STATE + "KEPT.update(a=1)"},
        "a.py, line 3 ": {"a": STATE + "del KEPT[1]"},
        "a.py, line 2 writes": {"a": "KEPT: list[int] = []\nKEPT += [1]"},
        "b.py, line 2 writes to a.KEPT": {"a": "KEPT = set()", "b": "from a import *\nKEPT.add(1)"},
        "b.py, line 1 writes to a.KEPT": {"a": "KEPT = Counter()", "b": "a.KEPT['x'] += 1"},
        "a.py has a global statement": {"a": "n = 0\ndef f():\n    global n"},
    }),
    tensors_have_shapes: (HOUSE, {
        "model.py, line 1: f names": {"model": "def f(x: Tensor):\n    return x  # [B]"},
        "model.py, line 2: f names": {"model": "class A:\n    def f(self) -> 'Tensor | None':\n"
                                               "        '''All of x[i].'''"},
        "batch.py, line 2:": {"batch": "class A:\n    seq_len: Tensor  # lengths"},
    }),
    public_things_say_what_they_do: (HOUSE, {
        "a.py, line 1: A has no docstring": {"a": "class A:\n    x = 1"},
        "a.py, line 1: f has no docstring": {"a": "def f(): pass"},
        "a.py, line 3: f has no docstring": {"a": "class A:\n    'B.'\n    def f(): pass"},
        "a.py, line 1: f raises unsaid": {"a": "def f():\n    'A.'\n    raise ValueError('no')"},
    }),
    namespaces_stay_in_commands: (HOUSE, {
        "a.py, line 1": {"a": "def f(args: argparse.Namespace): pass"},
        "a.py, line 2": {"a": "\nfrom argparse import Namespace as N"},
    }),
    nothing_stands_twice: (HOUSE, {
        "b.py, line 2 repeats a.py, line 1": {"a": SIX, "b": "x = 1\n" + SIX.replace(" ", "")},
        "a.py, line 9 repeats a.py, line 1": {"a": SIX + "x = 1\n" + SIX},
    }),
    only_the_batch_writes_its_text: (HOUSE + OUTSIDE, {
        "a.py, line 1 writes seq_len": {"a": "engine.batch.seq_len.fill_(3)"},
        "a.py, line 1 writes accepted": {"a": "batch.accepted[0] = 3"},
        "a.py, line 1 writes drafted": {"a": "batch.drafted += 3"},
        "a.py, line 1 writes tokens": {"a": "engine.batch.tokens[0, :3].copy_(x)"},
        "a.py, line 1 writes limit": {"a": "a, batch.limit = 1, 2"},
        "a.py, line 2 writes finished": {"a": "def f(finished):\n    finished.logical_or_(1)"},
        "a.py, line 3 writes prompt_len": {"a": "def f(b):\n    n = b.prompt_len\n    n[0] = 3"},
        "a.py, line 3 writes n_rounds": {"a": "def f(b):\n    n = b.n_rounds\n    n += 3"},
        "line 1 writes seq_len": {"a": "batch.seq_len.view(2, 2).zero_()"},
        "a.py, line 1 writes eos": {"a": "torch.add(a, b, out=batch.eos)"},
        "a.py, line 3 writes tokens": {"a": "class A:\n    def f(self):\n        self.tokens = 1"},
    }),
    reports_know_no_drafters: (HOUSE, {
        "report.py, line 1 knows ModelDrafter": {"report": "from x import ModelDrafter as M"},
        "measure.py, line 1 knows LookupDrafter": {"measure": "a(d, drafters.LookupDrafter)"},
    }),
    strategies_are_not_compared: (HOUSE, {
        "auto.py, line 1 compares with 'ngram'": {"auto": "strategy.policy == 'ngram'"},
        "drafters.py, line 2": {"drafters": "def f(s):\n    return s in ('full', 'other')"},
        "cost_model.py, line 2": {"cost_model": "class Other:\n    x = a.policy != 'none'"},
        "measure.py, line 2": {"measure": "match policy:\n    case 'snapkv': pass"},
    }),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_house(rule):
    complaints = list(rule(RULES[rule][0]))
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rules_complain(rule):
    for complaint, broken in RULES[rule][1].items():
        assert complaint in "\n".join(rule([source(*file) for file in broken.items()]))


def test_every_file_has_its_tests():
    tests = {source.name for source in read("tests")}
    drafting = {"test_drafter", "test_draft_models"}  # test_drafters has the tests of all three
    assert {f"test_{source.name}" for source in HOUSE} - tests == drafting


def test_contributing_names_what_there_is():
    """Files and, in capitals or with a capital, things of the sources."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    quoted = set(re.findall(r"`([^`\s]+)`", text)) | set(re.findall(r"python (\S+)", text))
    files = {name for name in quoted if re.search(r"\.\w+$", name)}
    names = {name for name in quoted - files if name[0].isupper()}
    assert len(files) >= 10 and len(names) >= 6
    assert not [name for name in files if not list(ROOT.glob(name))]
    sources = "\n".join(source.text for source in HOUSE + OUTSIDE)
    assert not [name for name in names if not re.search(rf"^(class )?{name}\b", sources, re.M)]
