"""What torch-tensorrt makes of our networks, learnt from its own sources where TensorRT itself is not.

A process of its own, `python -m tests.engines.lowered SOURCES PART`: puts something that does nothing in
TensorRT's place, imports torch-tensorrt's Python sources, and lets them lower each network as they would
before handing it to TensorRT. Prints a line of JSON for each: its operators, those that no converter takes,
names of inputs and outputs, keywords that nobody knows. No library of NVIDIA's is loaded and no GPU asked.
"""

import importlib.machinery
import inspect
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from facenet_pytorch.models.mtcnn import ONet, PNet, RNet
from torch import Tensor, nn
from torch.export import Dim

from detectors.backbones import Architecture, FaceNetwork
from detectors.members import list_halves, list_members, load_member
from detectors.published import build
from detectors.readings import Visible
from engines.exported import exported, without_ceil

BATCH = 16
VARIANTS = {
    "mirrored": Architecture("test_efficientnet", attention_block=1, mirrored=True),
    "half": Architecture("test_efficientnet", attention_block=None, half=Visible.LOWER),
    "cosine": Architecture("test_efficientnet", attention_block=None, cosine_range=16.0),
    "siamese": Architecture("test_efficientnet", attention_block=1, siamese=True),
}
"""What members may be and the shipped ones are not."""
LAYOUTS = ("EfficientNetAutoAttB4ST", "Xception")
MTCNN = {"PNet": (PNet, (3, 90, 160)), "RNet": (RNet, (3, 24, 24)), "ONet": (ONet, (3, 48, 48))}


class _Kinds(type):
    """Of a class that stands for one of TensorRT's: any member of it is something."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        found = MagicMock(name=f"{cls.__name__}.{name}")
        setattr(cls, name, found)
        return found


class _Nothing(types.ModuleType):
    """A module in which there is whatever is asked for, and nothing happens."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "rtx" in name:
            raise AttributeError(name)
        found = _Kinds(name, (), {}) if name[0].isupper() else MagicMock(name=name)
        setattr(self, name, found)
        return found


def stand_in(name: str) -> Any:
    module = _Nothing(name)
    module.__path__, module.__file__ = [], name
    module.__version__ = "11.1.0"
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules[name] = module
    return module


def prepare(sources: Path) -> None:
    """Make `import torch_tensorrt` possible from a folder with its Python sources alone."""
    tensorrt = stand_in("tensorrt")
    tensorrt.tensorrt = tensorrt
    sys.modules["tensorrt.tensorrt"] = tensorrt
    stand_in("dllist").dllist = list
    sys.path.insert(0, str(sources))
    torch.cuda.current_device = lambda: 0
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.mem_get_info = lambda *_: (1, 1)


def networks(part: str) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Yield networks that engines are built from, with an input each."""
    if part == "members":
        for name in (*list_members(), *list_halves()):
            member = load_member(name)
            yield name, member.module, torch.zeros(1, 3, member.policy.size, member.policy.size)
        for name, architecture in VARIANTS.items():
            yield name, FaceNetwork(architecture).eval(), torch.zeros(1, 3, 64, 64)
        return
    for name in LAYOUTS:
        yield name, build(name).eval(), torch.zeros(1, 3, 224, 224)


def main() -> None:
    sources, part = Path(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(1)
    prepare(sources)
    from torch_tensorrt.dynamo import _compiler

    from engines import tensorrt

    seen: dict[str, Any] = {}

    def interpret(gm: Any, inputs: Any, settings: Any, **names: Any) -> Any:
        seen.update(gm=gm, inputs=inputs, settings=settings, **names)
        return types.SimpleNamespace(serialized_engine=b"engine", aliased_io={})

    _compiler.interpret_module_to_result = interpret
    convert = _compiler.convert_exported_program_to_serialized_trt_engine
    known = set(inspect.signature(convert).parameters)

    def spied(program: Any, **keywords: Any) -> bytes:
        seen["unknown"] = sorted(set(keywords) - known)
        found: bytes = convert(program, **keywords)
        return found

    # where the product's own code looks for it
    sys.modules["torch_tensorrt"].dynamo.convert_exported_program_to_serialized_trt_engine = spied
    work: Iterator[tuple[str, Callable[[], bytes]]]
    if part == "mtcnn":
        work = ((name, lambda n=name: _mtcnn(n, spied)) for name in MTCNN)
    else:
        work = (
            (
                name,
                lambda m=module, e=example: tensorrt.serialised(
                    exported(m, "fp16", "cpu", BATCH, e, tensorrt.LAYOUT),
                    BATCH,
                    e,
                    Path("timings.bin"),
                    torch.device("cuda", 0),
                ),
            )
            for name, module, example in networks(part)
        )
    for name, make in work:
        engine = make()
        print(json.dumps({"network": name, "engine": engine.decode(), **_described(seen)}), flush=True)


def _mtcnn(name: str, convert: Callable[..., bytes]) -> bytes:
    import torch_tensorrt

    kind, shape = MTCNN[name]
    net = without_ceil(kind().eval().requires_grad_(False)).half()
    graph = torch.export.export(
        net, (torch.zeros(2, *shape, dtype=torch.half),), dynamic_shapes=({0: Dim("batch", min=1, max=64)},)
    )
    sizes = {"min_shape": (1, *shape), "opt_shape": (64, *shape), "max_shape": (64, *shape)}
    return convert(graph, arg_inputs=[torch_tensorrt.Input(dtype=torch.half, **sizes)])


def _described(seen: dict[str, Any]) -> dict[str, Any]:
    from torch_tensorrt.dynamo.conversion._ConverterRegistry import (
        DYNAMO_CONVERTERS,
    )

    DYNAMO_CONVERTERS.set_compilation_settings(seen["settings"])
    nodes = [node for node in seen["gm"].graph.nodes if node.op in ("call_function", "call_module")]
    return {
        "operators": sorted({str(node.target) for node in nodes}),
        # asked as torch-tensorrt asks: by node, so that what a converter says of arguments and shapes counts
        "unconverted": sorted({str(node.target) for node in nodes if node not in DYNAMO_CONVERTERS}),
        "inputs": seen.get("input_binding_names"),
        "outputs": seen.get("output_binding_names"),
        "profile": [list(map(list, given.shape.values())) for given in seen["inputs"]],
        "unknown_keywords": seen["unknown"],
    }


if __name__ == "__main__":
    main()
