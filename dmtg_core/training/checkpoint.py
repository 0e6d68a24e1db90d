"""Checkpoints of networks and optimisers: safetensors for tensors, JSON for all else, never a pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dmtg_core.addresses import check_code, recorded
from dmtg_core.names import listed
from dmtg_core.network import peft_format
from dmtg_core.network.grouping_network import GroupingNetwork, GroupModel
from dmtg_core.network.spec import NetworkSpec
from dmtg_core.tasks import Task

FORMAT = 2
FORMATS = (1, 2)  # readable formats
CORRECT_UP_TO = 10  # branches up to which a network of format 1 is correct; see `check_branches`
SEAL = "sha256.json"
FROZEN = ("stem.", "shared.")  # beginnings of the names of frozen weights
BASE = "base"  # folder beside those of the models with the frozen weights of all of them
BASE_WEIGHTS, BASE_FILE = "base.safetensors", "base.json"  # `BASE_FILE` has the digest


class OutdatedNetworkError(ValueError):
    """An earlier version trained this network incorrectly. It must be trained again."""


class FrozenWeightsError(ValueError):
    """The frozen weights of a network are missing, or are not those that it was trained with."""


def save_network(folder: Path, network: GroupingNetwork) -> None:
    """Write `network.json` (spec, live pairs, code of other packages) and `network.safetensors` (weights).

    Frozen weights that came from files are not written, but their digest is.
    """
    _save_network(folder, network, ())


def _save_network(folder: Path, network: GroupingNetwork, apart: Collection[str]) -> None:
    """Write a network without the tensors that are written apart."""
    folder.mkdir(parents=True, exist_ok=True)
    alive = [[bool(x) for x in row] for row in network.gate.alive.tolist()]
    parts = {"format": encoded(FORMAT), "spec": network.spec.text, "alive": encoded(alive)}
    if network.spec.code:
        parts["code"] = encoded([recorded(*pair).to_dict() for pair in network.spec.code])
    tensors = {name: tensor for name, tensor in network.state_dict().items() if name not in apart}
    if keeps_base(network):
        parts["frozen"] = encoded(network.frozen_digest)
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(FROZEN)}
    save_tensors(folder / "network.safetensors", tensors)
    write_encoded(folder / "network.json", parts)


def keeps_base(network: GroupingNetwork) -> bool:
    """Whether the frozen weights of a network came from files, so that they are not written with it."""
    return bool(network.frozen) and network.spec.encoder.pretrained


def load_network(
    folder: Path, device: torch.device | str = "cpu", base: Path | None = None, *, trust_code: bool = False
) -> GroupingNetwork:
    """Load the network of `save_network` with its pruned shape.

    Args:
        folder: Folder of the network, or of a group's model.
        device: Device of the network.
        base: Where frozen weights come from: the folder of `save_base`, or the file or folder that the encoder
            reads. By default the folder `BASE` beside this one, or else from where they first came from.
        trust_code: Import the code that the network names, also if it is not allowed or has changed.

    Raises:
        CodeError: As `dmtg_core.addresses.check_code`.
        ValueError: If the folder has no such checkpoint or an unknown format, if frozen weights are missing or
            have changed, and as `check_branches`.
    """
    described = read_json(folder / "network.json", "format")
    if described["format"] not in FORMATS:
        known = " and ".join(map(str, FORMATS))
        raise ValueError(f"{folder}: network format {described['format']!r}, this version reads {known}")
    try:
        spec = NetworkSpec.from_dict(described["spec"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder}: network.json does not describe a network ({error})") from error
    check_branches(described["format"], spec.groups, spec.tasks, str(folder))
    check_code(spec.code, described.get("code", ()), trust=trust_code)
    frozen = "frozen" in described
    try:
        if frozen:
            network = _with_frozen(folder, spec, described["frozen"], base)
        else:
            network = GroupingNetwork(spec.without_weights())
        network.keep(torch.tensor(described["alive"]))
        kept = {name: t for name, t in network.state_dict().items() if frozen and name.startswith(FROZEN)}
        network.load_state_dict(load_tensors(folder / "network.safetensors") | kept | _updates(folder, network))
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{folder}: network.json and network.safetensors do not fit ({error})") from error
    return network.to(device)


def save_base(folder: Path, network: GroupingNetwork) -> None:
    """Write the frozen weights of a network into `folder`, for all networks that have them."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t for name, t in network.state_dict().items() if name.startswith(FROZEN)}
    save_tensors(folder / BASE_WEIGHTS, tensors)
    write_json(folder / BASE_FILE, {"format": FORMAT, "digest": network.frozen_digest})


def _updates(folder: Path, network: GroupingNetwork) -> dict[str, Tensor]:
    """The updates of a branch that are in a file of their own, in the names of the network."""
    file = folder / peft_format.WEIGHTS
    return peft_format.from_peft(network, load_tensors(file)) if file.exists() else {}


def _with_frozen(folder: Path, spec: NetworkSpec, digest: str, base: Path | None) -> GroupingNetwork:
    """Build a network with the frozen weights of this digest."""
    source = base or _source(folder, spec)
    if (source / BASE_WEIGHTS).is_file():
        network = GroupingNetwork(spec.without_weights())
        network.load_state_dict(network.state_dict() | load_tensors(source / BASE_WEIGHTS))
        network.spec = spec
        network.frozen_once()
    else:
        network = GroupingNetwork(replace(spec, encoder=spec.encoder.with_source(str(source))))
        network.spec = spec
    if network.frozen_digest != digest:
        raise FrozenWeightsError(
            f"{folder}: the frozen weights in {source} have changed since training, SHA-256 {digest[:12]} "
            f"expected, {network.frozen_digest[:12]} found; restore them, or train again"
        )
    return network


def _source(folder: Path, spec: NetworkSpec) -> Path:
    """Where the frozen weights of a network are."""
    base, source = folder.parent / BASE, spec.encoder.source
    if base.is_dir():
        return base
    by_name = (spec.encoder.options or {}).get("weights")  # a name that the library knows, and no path
    if not by_name and not (source and Path(source).exists()):
        raise FrozenWeightsError(f"{folder}: the frozen weights are missing: neither {base} nor {source} exists")
    return Path(source)


def code_of(folder: Path) -> list[dict[str, str]]:
    """The records of the code of other packages that a stored network names, see `dmtg_core.addresses.Code`."""
    found: list[dict[str, str]] = read_json(folder / "network.json", "format").get("code", [])
    return found


def check_branches(written: int, branches: int, tasks: Sequence[Task], where: str) -> None:
    """Refuse a network whose heads were trained on the features of the wrong branches.

    These are the networks of format 1 with more than ten branches and a sample-wise task: branch 10 took the place
    of branch 2 in training. Their weights cannot be corrected.

    Args:
        written: Format of the network.
        branches: K of the network, or of the network that it is a part of.
        tasks: Tasks of the network.
        where: Beginning of the message.

    Raises:
        OutdatedNetworkError: For such a network.
    """
    wrong = [task.name for task in tasks if not task.dense]
    if written == 1 and branches > CORRECT_UP_TO and wrong:
        raise OutdatedNetworkError(
            f"{where}: an earlier version trained this on {branches} branches, and with over {CORRECT_UP_TO} it "
            f"trained heads ({listed(wrong, 3)}) on the features of other branches; the weights cannot "
            "be corrected: train it again"
        )


def save_model(folder: Path, model: GroupModel) -> None:
    """Write one group's model into `folder`, and the checksums of its files.

    Low-rank updates are in two files in the format of the PEFT library, the rest of the network is beside them.
    """
    network, names = model.network, ["network.json", "network.safetensors"]
    apart = peft_format.updates_of(network)
    _save_network(folder, network, apart)
    if apart:
        names += [peft_format.CONFIG, peft_format.WEIGHTS]
        write_json(folder / peft_format.CONFIG, peft_format.config_of(network))
        save_tensors(folder / peft_format.WEIGHTS, peft_format.to_peft(network))
    write_json(folder / SEAL, {name: _checksum(folder / name) for name in names})


def load_model(
    folder: Path,
    device: torch.device | str = "cpu",
    *,
    branches: int = 1,
    base: Path | None = None,
    trust_code: bool = False,
) -> GroupModel:
    """Load the model of `save_model` in evaluation mode. Models of earlier versions have no checksums.

    Args:
        folder: Folder of the model.
        device: Device of the model.
        branches: K of the network that it is a part of, if known.
        base, trust_code: As `load_network`.

    Raises:
        ValueError: As `load_network` and `check_seal`, and if the network has more than one group.
    """
    network = load_network(folder, base=base, trust_code=trust_code)
    if (folder / SEAL).exists():
        check_seal(folder)
    check_branches(read_json(folder / "network.json", "format")["format"], branches, network.tasks, str(folder))
    if network.spec.groups != 1:
        raise ValueError(f"{folder}: holds a network of {network.spec.groups} branches, not one group's model")
    return group_model(network).to(device).eval()


def group_model(network: GroupingNetwork) -> GroupModel:
    """Return a model with the weights of a network of one branch. Frozen parts are those of the network."""
    model = GroupModel(network.spec.without_weights())
    if network.frozen:
        model.network.use_frozen(network)
        model.spec = network.spec
    model.network.load_state_dict(network.state_dict())
    return model


def save_optimizer(path: Path, optimizer: torch.optim.Optimizer, network: nn.Module) -> None:
    """Write the optimiser's tensors under the names of their parameters."""
    tensors = {}
    for name, parameter in network.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = torch.as_tensor(value)
    save_tensors(path, tensors)


def load_optimizer(path: Path, optimizer: torch.optim.Optimizer, network: nn.Module) -> None:
    """Load the tensors of `save_optimizer` into an optimiser.

    Raises:
        ValueError: If the network does not have one of the parameters.
    """
    parameters = dict(network.named_parameters())
    for name, value in load_tensors(path).items():
        owner, key = name.rsplit("/", 1)
        if owner not in parameters:
            raise ValueError(f"{path}: optimiser state of {owner!r}, which the network does not have")
        parameter = parameters[owner]
        # the step count of a fused optimiser is on the device of its parameter; its moments have the memory format
        # of the parameter, which fused kernels assume
        held = torch.empty_like(parameter) if value.shape == parameter.shape else torch.empty_like(value)
        optimizer.state[parameter][key] = held.to(parameter.device).copy_(value)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors.

    Raises:
        OSError: If the file cannot be written, for example because the disk is full.
    """
    try:
        save_file({name: _copied(tensor) for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # the library's own error for those of the operating system
        raise OSError(f"{path}: {error}") from error


def _copied(tensor: Tensor) -> Tensor:
    """Copy a slice of a larger tensor, a shared tensor or a channels-last tensor to contiguous host memory."""
    host = tensor.detach().cpu()
    try:  # one thread: hundreds of small copies by several threads wait longer for each other than they take
        return torch.from_numpy(host.numpy().copy())
    except TypeError:  # a dtype that NumPy does not have, such as bfloat16
        return host.contiguous().clone()


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read safetensors.

    Raises:
        ValueError: If the file is missing or damaged.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: missing or damaged weights ({error})") from error


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write JSON. Python encodes indented text many times more slowly than a single line (`indent=None`)."""
    _write_text(path, encoded(value, indent))


def write_encoded(path: Path, parts: Mapping[str, str]) -> None:
    """Write a JSON object whose values are already encoded."""
    _write_text(path, f"{{{', '.join(f'{encoded(key)}: {text}' for key, text in parts.items())}}}")


def encoded(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON."""
    return json.dumps(value, indent=indent, ensure_ascii=False)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def read_json(path: Path, *keys: str) -> dict[str, Any]:
    """Read a JSON object that has `keys`.

    Raises:
        ValueError: If the file is missing or not JSON, or if it holds no such object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: missing or damaged ({error})") from error
    if not isinstance(values, dict) or not set(keys) <= values.keys():
        raise ValueError(f"{path}: expected an object with {', '.join(keys)}")
    return values


def seal(folder: Path) -> None:
    """Write the checksums of all files of a complete checkpoint, as its last file."""
    write_json(folder / SEAL, _checksums(folder))


def check_seal(folder: Path) -> None:
    """Check that the files of a checkpoint are complete and unchanged.

    Raises:
        ValueError: If the seal is missing, or files are missing or changed. The message names them.
    """
    expected = read_json(folder / SEAL)
    found = _checksums(folder)
    wrong = sorted(name for name in expected if found.get(name) != expected[name])
    if wrong:
        raise ValueError(f"{folder}: missing or damaged: {', '.join(wrong)}")


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != SEAL)
    return {file.relative_to(folder).as_posix(): _checksum(file) for file in files}


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
