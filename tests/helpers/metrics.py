"""Metrics as a Prometheus server reads them."""

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


def samples(text: str, engine: int = 0) -> dict[str, float]:
    """Counts of one engine with one windowed KV group, by name and the label ``kind``."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.startswith("swa_") or sample.labels["engine"] != str(engine):
                continue
            if sample.name.endswith("_info"):
                continue
            kind = sample.labels.get("kind")
            key = f"{sample.name}:{kind}" if kind else sample.name
            assert key not in found, "one KV group, each label once"
            found[key] = sample.value
    return found


def gained(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """What counters gained; those that gained nothing are left out."""
    assert before.keys() == after.keys()
    gains = {n: after[n] - before[n] for n in after if n.endswith("_total")}
    return {name: gain for name, gain in gains.items() if gain}


def value(text: str, name: str) -> float:
    """The only sample of that name."""
    (found,) = (s.value for s in _named(text, name))
    return float(found)


def total(text: str, name: str, engine: int) -> float:
    """The sum of an engine's samples of that name."""
    return float(sum(s.value for s in _named(text, name) if s.labels["engine"] == str(engine)))


def _named(text: str, name: str) -> list[Sample]:
    families = text_string_to_metric_families(text)
    return [sample for family in families for sample in family.samples if sample.name == name]
