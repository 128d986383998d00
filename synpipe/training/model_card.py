"""Describes a pretrained encoder: the entry for `encoders.yaml`, and a model card in Markdown.

Input: the report that `pretraining.pretrain` returns. Output: text.
"""

import json
from collections.abc import Iterator
from typing import Any


def registry_entry(name: str, weights: str, report: dict[str, Any]) -> str:
    """The entry as text, to paste into `encoders.yaml`. weights: the path relative to that file."""
    lines = [f"  {name}:", f"    model: {report['model']}", f"    weights: {weights}", "    precision: fp32"]
    if report["args"]:
        lines.append(f"    args: {json.dumps(report['args'])}")
    return "\n".join([*lines, f"    description: Trained on {', '.join(report['licences'])}."])


def model_card(name: str, report: dict[str, Any]) -> str:
    """The model card in Markdown."""
    return "\n".join(_card_lines(name, report)) + "\n"


def _card_lines(name: str, report: dict[str, Any]) -> Iterator[str]:
    yield from (f"# {name}", "")
    yield f"`{report['model']}`, {report['parameters']:,} parameters, trained without labels by `synpipe pretrain` on:"
    yield ""
    yield from (f"- {source} (licence: {licence})" for source, licence in report["licences"].items())
    yield from ("", "| held-out part of | places | untrained @1 | @1 | @5 |", "|---|---|---|---|---|")
    for source, trained in report["held_out"].items():
        untrained = report["held_out_untrained"][source]
        yield (
            f"| {source} | {trained['places']} | {untrained['recall_at_1']:.3f} | {trained['recall_at_1']:.3f} | "
            f"{trained['recall_at_5']:.3f} |"
        )
    yield ""
    yield "An altered view (turned, shifted, one section off, other contrast, noise) must find the place that it shows."
    yield ""
    yield f"{report['views']:,} views, {report['seconds']:,} s on {report['made_with']['device']}."
    yield "Mean loss of each twentieth of the training:"
    yield ", ".join(f"{loss:.2f}" for loss in report["loss"]) + "."
    yield from ("", "```json", json.dumps(report["recipe"], indent=1), "```")
