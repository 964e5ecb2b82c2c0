"""An installation in, its documented definitions, comments and options out.

Source files are parsed with `ast` and never imported; only compiled modules of the standard library, which have no
source, are asked for their docstrings. Every list is in sorted order, so one machine always gives the same library.
"""

import ast
import importlib
import importlib.util
import os
import re
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from tdro_hpc.embedded.docstrings import Docstring, parse_docstring, plain
from tdro_hpc.embedded.language import Section, read_sections

# Name -> bytes of source read at most. The files with the most documentation a byte come first.
PACKAGES = {
    "standard library": 4_000_000,
    "numpy": 2_000_000,
    "torch": 3_000_000,
    "transformers": 1_500_000,
    "scipy": 2_000_000,
    "sklearn": 2_000_000,
    "pandas": 2_000_000,
    "matplotlib": 1_500_000,
    "networkx": 1_500_000,
    "sympy": 1_500_000,
    "huggingface_hub": 600_000,
    "datasets": 600_000,
    "accelerate": 400_000,
    "peft": 400_000,
    "PIL": 500_000,
    "jinja2": 300_000,
    "fsspec": 300_000,
    "pip": 300_000,
    "setuptools": 300_000,
    "rich": 300_000,
}
# Folders with tests, copies of other packages, or generated near-copies.
_SKIPPED = {
    "tests", "test", "testing", "__pycache__", "site-packages", "dist-packages", "_vendor", "_vendored", "vendor",
    "vendored", "externals", "idlelib", "lib2to3", "turtledemo", "ensurepip", "models", "_inductor", "_dynamo",
    "_refs", "_decomp", "_numpy", "encodings", "pydoc_data",
}  # fmt: skip
COMPILED = ("builtins", "cmath", "itertools", "math", "posix", "time", "zlib", "binascii", "array", "_socket", "select")
_SEPARATE_CALL = re.compile(r"\b(add_docstr|add_docstr_all|add_newdoc)\(")
_FILE_COST = 4000  # bytes that a file counts beside its own, or tiny files would come before rich ones
_COMMENT = re.compile(r"^(\s*)# ([A-Z][^\n]*)$", re.MULTILINE)
_NOT_PROSE = re.compile(r"noqa|type:|TODO|FIXME|XXX|pragma|opyright|icens|pylint|mypy|isort|fmt:|https?:|>>>|@|---|===")
_OPTION_CALLS = ("add_argument", "add_option", "option")
_OPTION_CALL = re.compile(r"\.(add_argument|add_option|option)\(|metadata=\{\s*[\"']help")


@dataclass(frozen=True)
class Definition:
    """One documented function, class, method or module."""

    package: str
    module: str  # dotted, as it would be imported
    name: str  # inside its module: split, or JSONDecoder.decode; "" for the module itself
    kind: str  # function, class, method, module
    doc: Docstring
    parameters: tuple[str, ...] = ()
    code: str = ""  # source without docstring and decorators; "" for classes and compiled definitions

    @property
    def leaf(self) -> str:
        """The last part of the name."""
        return self.name.rsplit(".", 1)[-1]

    @property
    def origin(self) -> str:
        """What is held out as a whole: the module, or the class where a module is one large list of docstrings."""
        lists = self.module in COMPILED or self.module.endswith("docs")
        return f"{self.module}:{self.name}" if lists else self.module


@dataclass(frozen=True)
class Remark:
    """A comment with the code under it, or a command-line option with its help."""

    module: str
    head: str  # the comment; the option
    text: str  # the code; the help


@dataclass
class Library:
    """Everything read from this machine."""

    definitions: list[Definition] = field(default_factory=list)
    comments: list[Remark] = field(default_factory=list)
    options: list[Remark] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)  # of the language reference
    files: dict[str, int] = field(default_factory=dict)  # package -> files read
    unreadable: int = 0  # files that this Python cannot parse


def read_library(packages: Mapping[str, int] = MappingProxyType(PACKAGES)) -> Library:
    """The documentation of those packages that are installed, of compiled modules and of the language.

    packages  name -> bytes of source read at most
    """
    library = Library(sections=read_sections())
    for package, byte_budget in packages.items():
        root = _root_of(package)
        if root is not None:
            _read_package(library, package, root, byte_budget)
    for module in COMPILED:
        library.definitions += _compiled_definitions(module)
    return library


def _root_of(package: str) -> Path | None:
    """Folder of an installed package, found without importing it."""
    if package == "standard library":
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _read_package(library: Library, package: str, root: Path, byte_budget: int) -> None:
    texts = []
    for path in _python_files(root):
        text = path.read_text(encoding="utf-8", errors="replace")
        worth = text.count('"""') + 4 * len(_OPTION_CALL.findall(text))
        if worth:
            texts.append((-worth / (len(text) + _FILE_COST), path.relative_to(root).as_posix(), text))
    texts.sort()
    prefix = "" if package == "standard library" else package + "."
    for _, relative, text in texts:
        if byte_budget <= 0:
            break
        byte_budget -= len(text)
        module = prefix + relative.removesuffix(".py").replace("/", ".")
        _read_file(library, package, module.removesuffix(".__init__"), text)


def _python_files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED)
        yield from (Path(folder) / name for name in sorted(names) if name.endswith(".py") and "test" not in name)


def _read_file(library: Library, package: str, module: str, text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's escape sequences
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            library.unreadable += 1
            return
    library.files[package] = library.files.get(package, 0) + 1
    lines = text.splitlines()
    if raw := ast.get_docstring(tree, clean=False):
        library.definitions.append(Definition(package, module, "", "module", parse_docstring(raw)))
    library.definitions += _definitions(tree.body, package, module, lines, prefix="")
    library.definitions += _separate_docstrings(tree, package, text)
    library.comments += _comments(text, module)
    library.options += _options(tree, module, text)


def _definitions(body: list[ast.stmt], package: str, module: str, lines: list[str], *, prefix: str) -> list[Definition]:
    """Documented classes, functions and methods of a body, also under `if` and `try`; not inside functions."""
    found = []
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            found += _definitions(node.body, package, module, lines, prefix=prefix)
        elif isinstance(node, ast.ClassDef):
            if raw := ast.get_docstring(node, clean=False):
                found.append(Definition(package, module, prefix + node.name, "class", parse_docstring(raw)))
            found += _definitions(node.body, package, module, lines, prefix=f"{prefix}{node.name}.")
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (raw := ast.get_docstring(node, clean=False)):
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            found.append(
                Definition(
                    package,
                    module,
                    prefix + node.name,
                    "method" if prefix else "function",
                    parse_docstring(raw),
                    tuple(argument.arg for argument in arguments),
                    _code_without_docstring(node, lines),
                )
            )
    return found


def _code_without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """Source of a function from `def` on; empty where the docstring is all there is."""
    docstring = node.body[0]
    rest = lines[docstring.end_lineno : node.end_lineno]
    if len(node.body) == 1 or docstring.lineno == node.lineno:
        return ""
    return textwrap.dedent("\n".join(lines[node.lineno - 1 : docstring.lineno - 1] + rest))


def _separate_docstrings(tree: ast.Module, package: str, text: str) -> list[Definition]:
    """Docstrings of compiled functions, which numpy, scipy and torch keep in calls: add_docstr(torch.abs, text)."""
    found: list[Definition] = []
    if not _SEPARATE_CALL.search(text):
        return found
    for statement in tree.body:
        call = statement.value if isinstance(statement, ast.Expr) else None
        if not isinstance(call, ast.Call) or len(call.args) < 2:
            continue
        if not _SEPARATE_CALL.match(ast.unparse(call.func) + "("):
            continue
        # add_docstr(torch.abs, doc), add_newdoc("abs", doc), add_newdoc("numpy", "ndarray", ("flags", doc))
        owners, last = call.args[:-1], call.args[-1]
        if isinstance(last, ast.Tuple) and len(last.elts) == 2:
            owners, last = [*owners, last.elts[0]], last.elts[1]
        names = [str(part.value) if isinstance(part, ast.Constant) else ast.unparse(part) for part in owners]
        if raw := _constant_text(last):
            doc = parse_docstring(raw.replace("\\", ""))
            found.append(Definition(package, f"{package}.docs", ".".join(names[-2:]), "function", doc))
    return found


def _constant_text(node: ast.expr) -> str:
    """The constant text at the start of an expression: "..." or "...".format(...) or "..." + more."""
    while True:
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else ""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            node = node.func.value
        elif isinstance(node, ast.BinOp):
            node = node.left
        else:
            return ""


def _comments(text: str, module: str) -> list[Remark]:
    """Comments of one to three lines with the one to six lines of code under them, up to the end of the block."""
    lines = text.splitlines()
    found = []
    number = 0
    while number < len(lines):
        match = _COMMENT.match(lines[number])
        if not match:
            number += 1
            continue
        indent, words = match.group(1), [match.group(2)]
        number += 1
        while number < len(lines) and lines[number].startswith(f"{indent}#"):
            words.append(lines[number].strip("# \t"))
            number += 1
        code = []
        for line in lines[number : number + 6]:
            if not line.startswith(indent) or not line.strip() or line.strip().startswith("#"):
                break
            code.append(line)
        comment = plain(" ".join(words))
        if len(words) <= 3 and not _NOT_PROSE.search(comment) and code:
            found.append(Remark(module, comment, textwrap.dedent("\n".join(code))))
    return found


def _options(tree: ast.Module, module: str, text: str) -> list[Remark]:
    """Command-line options (--name) and documented settings (field(metadata={"help": ...})) with their help."""
    found: list[Remark] = []
    if not _OPTION_CALL.search(text):
        return found  # a walk over the whole tree is slow
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            names = [str(argument.value) for argument in node.args if isinstance(argument, ast.Constant)]
            long_names = [name for name in names if name.startswith("--")]
            if called in _OPTION_CALLS and long_names:
                found += _option(module, long_names[0], node.keywords)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Call):
            for keyword in node.value.keywords:
                if keyword.arg == "metadata" and isinstance(keyword.value, ast.Dict):
                    pairs = zip(keyword.value.keys, keyword.value.values, strict=True)
                    helps = [value for key, value in pairs if isinstance(key, ast.Constant) and key.value == "help"]
                    found += _option(module, "--" + node.target.id, [ast.keyword("help", value) for value in helps])
    return found


def _option(module: str, name: str, keywords: list[ast.keyword]) -> list[Remark]:
    for keyword in keywords:
        if keyword.arg == "help" and isinstance(keyword.value, ast.Constant) and isinstance(keyword.value.value, str):
            return [Remark(module, name, plain(keyword.value.value))]
    return []


def _compiled_definitions(module: str) -> list[Definition]:
    """Docstrings of a compiled module of the standard library and of its classes."""
    try:
        loaded = importlib.import_module(module)
    except ImportError:
        return []  # not compiled into every Python, such as posix on other systems
    found = []
    for name in sorted(vars(loaded)):
        value = getattr(loaded, name)
        if name.startswith("_") or not callable(value) or not isinstance(value.__doc__, str):
            continue
        kind = "class" if isinstance(value, type) else "function"
        found.append(Definition("standard library", module, name, kind, parse_docstring(value.__doc__)))
        for inner in sorted(vars(value)) if isinstance(value, type) else ():
            raw = getattr(vars(value)[inner], "__doc__", None)
            if not inner.startswith("_") and isinstance(raw, str):
                doc = parse_docstring(raw)
                found.append(Definition("standard library", module, f"{name}.{inner}", "method", doc))
    return found
