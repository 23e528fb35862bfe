"""The modelling file of hub.code: what transformers needs of models/ to load a pushed student without this project.

It is written from the sources, never by hand: the classes of models/auto.py, and every definition that they reach, with
its comments, from the module it stands in. Where two modules use one name for two things, that of the later one gets
its module's name in front. Nothing is imported or run for it.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from trainer.hub.usage import MODELS

ROOT = Path(__file__).resolve().parents[2] / "models"
LINE = 120  # characters
HEAD = '''"""{title} for transformers in one file, written by trainer/hub/code.py from models/ of m2mkd.

{origin}

Needs torch, timm, transformers, safetensors and huggingface_hub. Not to be changed by hand.
"""
'''
FACE = "auto"  # the module whose REMOTE names the classes of each kind of student, by transformers' Auto classes


def file_name(model_type: str) -> str:
    """What the file of a kind of student is called."""
    return f"{MODELS[model_type].remote}.py"


def auto_map(model_type: str, root: Path = ROOT) -> dict[str, str]:
    """What config.json says of the file: transformers' Auto class -> module and class."""
    remote = _remote(_Module(root, FACE), model_type)
    return {auto: f"{MODELS[model_type].remote}.{name}" for auto, name in remote.items()}


def modelling_file(model_type: str, origin: str, root: Path = ROOT) -> str:
    """The file's text, the same for the same sources.

    Args:
        model_type: the kind of student, as in its config.json.
        origin: address and commit of the sources, for its head.

    Raises:
        ValueError: the sources use what cannot be put into one file; the line is named.
    """
    bundle = _Bundle(root, file_name(model_type))
    for name in _remote(bundle.module(FACE), model_type).values():
        bundle.reach(FACE, name)
    return bundle.text(HEAD.format(title=MODELS[model_type].title, origin=origin))


def _remote(face: _Module, model_type: str) -> dict[str, str]:
    statement = face.defined["REMOTE"]
    return ast.literal_eval(statement.node.value)[model_type]


@dataclass(frozen=True)
class _Statement:
    """A statement at the top of a module, with the comments above it."""

    node: ast.stmt
    first: int  # line, from 1
    last: int


@dataclass
class _Module:
    """One source file: what it defines and what it imports, by name."""

    root: Path
    name: str  # as moe.layer; of a package moe
    defined: dict[str, _Statement] = field(default_factory=dict)
    inner: dict[str, tuple[str, str]] = field(default_factory=dict)  # name -> (module here, its name there)
    outer: dict[str, tuple[str, str]] = field(default_factory=dict)  # name -> ("from x", "name") or ("import x", "")
    lines: list[str] = field(default_factory=list)
    annotations: bool = False  # from __future__

    def __post_init__(self) -> None:
        path = self.root.joinpath(*self.name.split("."))
        is_package = path.is_dir()
        path = path / "__init__.py" if is_package else path.with_suffix(".py")
        text = path.read_text()
        self.lines = text.splitlines()
        parents = self.name.split(".") if is_package else self.name.split(".")[:-1]
        end = 0
        for node in ast.parse(text).body:
            decorators = getattr(node, "decorator_list", [])
            first = min([node.lineno, *(decorator.lineno for decorator in decorators)])
            statement = _Statement(node, self._with_comments(first, end), node.end_lineno)
            end = node.end_lineno
            if isinstance(node, ast.ImportFrom) and node.module == "__future__":
                self.annotations = True
            elif isinstance(node, ast.ImportFrom) and node.level:
                package = [*parents[: len(parents) - node.level + 1], *(node.module or "").split(".")]
                source = ".".join(part for part in package if part)
                for alias in node.names:
                    self.inner[alias.asname or alias.name] = (source, alias.name)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                for alias in node.names:
                    self.outer[alias.asname or alias.name.split(".")[0]] = _imported(node, alias)
            else:
                for name in _bound(node):
                    self.defined[name] = statement

    def _with_comments(self, first: int, end: int) -> int:
        """The line where the comments directly above line `first` begin, below line `end`."""
        while first - 1 > end and self.lines[first - 2].startswith("#"):
            first -= 1
        return first


class _Bundle:
    """What has been reached so far."""

    def __init__(self, root: Path, file: str) -> None:
        self.root = root
        self.file = file  # what it becomes, for messages
        self.modules: dict[str, _Module] = {}
        self.reached: dict[str, list[_Statement]] = {}  # module -> its statements, in order of depth first
        self.uses: dict[str, set[str]] = {}  # module -> modules it takes names from
        self.imports: dict[str, set[str]] = {}  # "from x" or "import x" -> what is imported from it
        self.renamed: dict[str, dict[str, str]] = {}  # module -> its names that are others in the file

    def module(self, name: str) -> _Module:
        if name not in self.modules:
            self.modules[name] = _Module(self.root, name)
            self.reached[name] = []
            self.uses[name] = set()
        return self.modules[name]

    def reach(self, module_name: str, name: str) -> str:
        """Take a definition and all it reaches; returns the module it stands in."""
        module = self.module(module_name)
        if name in module.inner:
            return self.reach(*module.inner[name])  # a package's face
        if name not in module.defined:
            raise ValueError(f"models/{module_name}: {name} is used but not defined there; import it by its name.")
        statement = module.defined[name]
        if statement in self.reached[module_name]:
            return module_name
        self.reached[module_name].append(statement)
        for node in ast.walk(statement.node):
            if isinstance(node, ast.ImportFrom) and node.level:
                raise ValueError(
                    f"models/{module_name} line {node.lineno} imports inside of a function that {self.file} needs: "
                    f"import at the top, or keep it out of what models/{FACE}.py reaches."
                )
            if not isinstance(node, ast.Name):
                continue
            if node.id in module.inner:
                source, there = module.inner[node.id]
                if there != node.id:
                    raise ValueError(
                        f"models/{module_name} calls {there} {node.id}: {self.file} needs it by its own name."
                    )
                home = self.reach(source, there)
                self.uses[module_name].add(home)
            elif node.id in module.outer:
                source, what = module.outer[node.id]
                self.imports.setdefault(source, set()).add(what)
            elif node.id in module.defined:
                self.reach(module_name, node.id)
        return module_name

    def text(self, head: str) -> str:
        """The file."""
        modules = [name for name in self._ordered() if self.reached[name]]
        parts = [head]
        if any(self.modules[name].annotations for name in modules):
            parts.append("from __future__ import annotations\n")
        parts += self._import_lines()
        taken: set[str] = set()
        for module_name in modules:
            statements = sorted(self.reached[module_name], key=lambda statement: statement.first)
            names = {name for statement in statements for name in _bound(statement.node)}
            marked = module_name.replace(".", "_")
            self.renamed[module_name] = {name: f"_{marked}_{name.lstrip('_')}" for name in names & taken}
            taken |= names
            parts.append(f"\n\n# ---- models/{module_name.replace('.', '/')}.py")
            replaced = self._replaced_in(module_name)
            for statement in statements:
                blank = "\n\n" if isinstance(statement.node, ast.FunctionDef | ast.ClassDef) else ""
                parts.append(blank + self._source(module_name, statement, replaced))
        text = "\n".join(parts) + "\n"
        _check(text, self.file)
        return text

    def _import_lines(self) -> list[str]:
        """Imports of packages, those of a module on one line, or one below the other."""
        lines = []
        for source in sorted(self.imports, key=lambda source: (source.startswith("from"), source)):
            names = sorted(name for name in self.imports[source] if name)
            line = f"{source} import {', '.join(names)}" if names else source
            if len(line) > LINE:
                listed = "".join(f"    {name},\n" for name in names)
                line = f"{source} import (\n{listed})"
            lines.append(line)
        return lines

    def _replaced_in(self, module_name: str) -> dict[str, str]:
        """Names that a module's source has and the file calls otherwise: its own, and those that it imports."""
        replaced = dict(self.renamed[module_name])
        for name, (source, there) in self.modules[module_name].inner.items():
            of_home = self.renamed.get(self._home(source, there), {})
            if there in of_home:
                replaced[name] = of_home[there]
        return replaced

    def _home(self, module_name: str, name: str) -> str:
        if module_name not in self.modules:
            return module_name
        inner = self.modules[module_name].inner
        return self._home(*inner[name]) if name in inner else module_name

    def _ordered(self) -> list[str]:
        """Modules, each behind those it takes names from."""
        ordered: list[str] = []

        def add(name: str) -> None:
            if name not in ordered:
                for used in sorted(self.uses[name]):
                    add(used)
                ordered.append(name)

        for name in sorted(self.modules):
            add(name)
        return ordered

    def _source(self, module_name: str, statement: _Statement, renamed: Mapping[str, str]) -> str:
        lines = self.modules[module_name].lines[statement.first - 1 : statement.last]
        places = list(_places(statement.node, renamed, f"models/{module_name}", self.file))
        for line, column, name in sorted(places, reverse=True):
            index = line - statement.first
            old = lines[index].encode()  # ast counts bytes
            changed = old[:column] + renamed[name].encode() + old[column + len(name.encode()) :]
            lines[index] = changed.decode()
        return "\n".join(lines)


def _places(node: ast.stmt, renamed: Mapping[str, str], where: str, file: str) -> Iterator[tuple[int, int, str]]:
    """Where in the source the names stand that get another one: line, byte, name.

    Raises:
        ValueError: a name that is also one inside of a function, which would change with it.
    """
    for part in ast.walk(node):
        if isinstance(part, ast.arg) and part.arg in renamed:
            raise ValueError(f"{where} line {part.lineno}: argument {part.arg} is a name of another module in {file}.")
        if isinstance(part, ast.Name) and part.id in renamed:
            is_inside = not isinstance(part.ctx, ast.Load) and part.col_offset > 0
            if is_inside:
                raise ValueError(f"{where} line {part.lineno}: {part.id} is a name of another module in {file}.")
            yield part.lineno, part.col_offset, part.id
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in renamed:
        keyword = "class " if isinstance(node, ast.ClassDef) else "def "
        yield node.lineno, node.col_offset + len(keyword), node.name


def _check(text: str, file: str) -> None:
    """Every name that the file uses is one it has."""
    tree = ast.parse(text)
    known = set(dir(builtins)) | {"__file__", "__name__"}
    used: dict[str, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Load):
                used.setdefault(node.id, node.lineno)
            else:
                known.add(node.id)
        elif isinstance(node, ast.arg):
            known.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            known.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            known |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ExceptHandler) and node.name:
            known.add(node.name)
    missing = sorted(set(used) - known)
    if missing:
        raise ValueError(f"{file} would use {missing[0]} in line {used[missing[0]]} without having it.")


def _bound(node: ast.stmt) -> Sequence[str]:
    """Names that a statement at the top of a module gives a value."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return [part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)]


def _imported(node: ast.Import | ast.ImportFrom, alias: ast.alias) -> tuple[str, str]:
    renamed = f" as {alias.asname}" if alias.asname else ""
    if isinstance(node, ast.Import):
        return f"import {alias.name}{renamed}", ""
    return f"from {node.module}", f"{alias.name}{renamed}"
