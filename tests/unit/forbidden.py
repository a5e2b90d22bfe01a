"""Constructs that first-party code must not have: they load code from data, or open the machine to others."""

import ast
from collections.abc import Iterator

PICKLES = frozenset(["pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"])
SAFE_LOADERS = frozenset({"SafeLoader", "CSafeLoader"})
CALLS = {
    "torch.load": "pickles run code; use safetensors",
    "pandas.read_pickle": "pickles run code; use Parquet",
    "pd.read_pickle": "pickles run code; use Parquet",
    "yaml.unsafe_load": "use yaml.safe_load",
    "yaml.full_load": "use yaml.safe_load",
    "eval": "runs text as code",
    "exec": "runs text as code",
    "os.system": "goes through a shell; use subprocess.run([...])",
    "os.popen": "goes through a shell; use subprocess.run([...])",
    "tempfile.mktemp": "others can take the name first; use mkstemp or TemporaryDirectory",
}
HTTP_DOORS = ("boundary/http.py", "tracking/transport.py")
"""The modules that may make connections themselves."""
AROUND_HTTP = "goes around raylign.boundary.http, its deadline and its limit"
CALLS |= dict.fromkeys(
    (
        *(
            f"{library}.{name}"
            for library in ("requests", "httpx")
            for name in ("get", "post", "put", "request", "head")
        ),
        *("requests.Session", "requests.session", "httpx.Client", "httpx.AsyncClient", "httpx.stream"),
        *("urllib.request.urlopen", "urllib.request.build_opener", "urllib.request.urlretrieve"),
        *("aiohttp.ClientSession", "http.client.HTTPConnection", "http.client.HTTPSConnection", "urllib3.PoolManager"),
    ),
    AROUND_HTTP,
)
FLAGS = {"allow_pickle": True, "shell": True, "trust_remote_code": True, "weights_only": False, "verify": False}
"""Literal arguments, and what they must not be."""
OPENERS = frozenset(["from_pretrained", "from_config"])
WORDS = {
    "0.0.0.0": "is every network interface",
    "::": "is every network interface",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "lets vLLM unpickle what it is sent",
    "VLLM_SERVER_DEV_MODE": "opens vLLM's own control to its clients",
}


def forbidden(source: str) -> list[str]:
    """`line N: what and why` for everything in a module that is not allowed."""
    return [f"line {line}: {fault}" for line, fault in sorted(set(_faults(ast.parse(source))))]


def _faults(tree: ast.AST) -> Iterator[tuple[int, str]]:
    aliases = _aliases(tree)
    for node in ast.walk(tree):
        match node:
            case ast.Import() | ast.ImportFrom():
                yield from ((node.lineno, f"imports {name}") for name in _modules(node) if name in PICKLES)
            case ast.Call():
                yield from ((node.lineno, fault) for fault in _call_faults(node, aliases))
            case ast.Constant(value=str(text)) if text in WORDS:
                yield node.lineno, f"{text!r} {WORDS[text]}"
            case ast.Dict():
                yield from _dict_faults(node)


def _modules(node: ast.Import | ast.ImportFrom) -> list[str]:
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    return [name.split(".")[0] for name in names]


def _aliases(tree: ast.AST) -> dict[str, str]:
    """Local names of imported modules and functions, and their own."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _call_faults(node: ast.Call, aliases: dict[str, str]) -> Iterator[str]:
    name = _dotted(node.func, aliases)
    if name in CALLS:
        yield f"{name}: {CALLS[name]}"
    if name in ("yaml.load", "yaml.load_all") and not _is_safe(node, aliases):
        yield f"{name} without SafeLoader: use yaml.safe_load"
    for keyword in node.keywords:
        if keyword.arg in FLAGS and _is(keyword.value, FLAGS[keyword.arg]):
            yield f"{keyword.arg}={FLAGS[keyword.arg]}"


def _dict_faults(node: ast.Dict) -> Iterator[tuple[int, str]]:
    """Flags that are passed on as `**{...}`."""
    for key, value in zip(node.keys, node.values, strict=True):
        if isinstance(key, ast.Constant) and key.value in FLAGS and _is(value, FLAGS[key.value]):
            yield node.lineno, f"{key.value}={FLAGS[key.value]}"


def _is(node: ast.expr, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def _is_safe(node: ast.Call, aliases: dict[str, str]) -> bool:
    given = [*node.args[1:], *(keyword.value for keyword in node.keywords if keyword.arg == "Loader")]
    return any(_dotted(loader, aliases).split(".")[-1] in SAFE_LOADERS for loader in given)


def _dotted(node: ast.expr, aliases: dict[str, str]) -> str:
    """`a.b.c` of an expression that is such a name, else empty; the first part under its own name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    return ".".join([aliases.get(node.id, node.id), *reversed(parts)])


def opened_elsewhere(tree: ast.AST) -> list[int]:
    """Lines that let transformers or PEFT open a model, tokenizer or config: one module does that for all."""
    return sorted(
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr in OPENERS)
        or (isinstance(node, ast.Constant) and node.value in OPENERS)
    )
