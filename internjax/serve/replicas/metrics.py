"""Prometheus texts of several replicas as one, with a label that says whose each number is."""

from collections.abc import Iterable, Mapping


def labelled(line: str, replica: int) -> str:
    """Adds the label `replica` to one sample, after any that it has."""
    name, brace, rest = line.partition("{")
    if brace:
        labels, _, value = rest.rpartition("}")
        comma = "," if labels and not labels.endswith(",") else ""
        return f'{name}{{{labels}{comma}replica="{replica}"}}{value}'
    name, _, value = line.partition(" ")
    return f'{name}{{replica="{replica}"}} {value}'


def merge(texts: Mapping[int, str]) -> str:
    """Joins the texts of replicas; all samples of one metric stand together, as the format asks."""
    comments: dict[str, dict[str, str]] = {}
    samples: dict[str, list[str]] = {}
    for replica, text in texts.items():
        family = ""
        for line in filter(None, map(str.strip, text.splitlines())):
            if line.startswith("#"):
                kind, name = line.split(maxsplit=3)[1:3] if line.count(" ") > 1 else ("", "")
                if kind in ("HELP", "TYPE"):
                    family = name
                    comments.setdefault(family, {}).setdefault(kind, line)
                continue
            name = line.partition("{")[0].partition(" ")[0]
            if not (family and _belongs(name, family)):
                family = name
            samples.setdefault(family, []).append(labelled(line, replica))
    lines = [
        line for f, found in samples.items() for line in (*comments.get(f, {}).values(), *found)
    ]
    return "".join(f"{line}\n" for line in lines)


def _belongs(name: str, family: str) -> bool:
    return name.removeprefix(family) in ("", "_bucket", "_sum", "_count", "_total", "_created")


def written(name: str, kind: str, meaning: str, values: Iterable[tuple[int, float]]) -> str:
    """Writes one metric of the router itself; `values`: (replica, number)."""
    lines = [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
    lines += [f'{name}{{replica="{replica}"}} {value:g}' for replica, value in values]
    return "".join(f"{line}\n" for line in lines)
