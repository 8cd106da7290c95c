"""This machine as a profile: what was measured, what its processor says, what its memory has free."""

from __future__ import annotations

import platform
from collections.abc import Mapping

import psutil

from tersor.core.measurement import Measurement
from tersor.hardware.profile import Alignment, Basis, Caution, Figure, Precision, Profile, Sparsity
from tersor.hardware.roofline import Roofline, processor
from tersor.measure.onnx_cpu import saturates_int8

THIS = "this"
MEASURED: tuple[Precision, ...] = ("fp32", "bf16", "int8")
_LANES: Mapping[str, int] = {"avx512f": 16, "avx2": 8}  # channels in a block of MLAS's convolutions


def this_profile(roofline: Roofline) -> Profile:
    """The profile of this machine, whose ``roofline`` was measured."""
    name = processor()
    lanes = next((lanes for flag, lanes in _LANES.items() if flag in name.split()), 8)
    compute = {precision: _figure(roofline.peaks[precision]) for precision in MEASURED}
    return Profile(
        name=THIS, title=f"this machine ({name})", kind="this machine",
        memory=Figure(
            value=float(psutil.virtual_memory().available), basis="measured",
            source="Memory that this machine has available now (psutil)",
        ),
        bandwidth=_figure(roofline.bandwidths[-1][1]), compute=compute, weight_bits=(8, 4), activation_bits=(8,),
        integers="ONNX Runtime's CPU backend: uint8 activations by int8 weights; MatMulNBits for 4-bit weights",
        sparsity=Sparsity(pattern="none", source="ONNX Runtime's CPU backend has no kernels that skip zeros"),
        alignment=Alignment(multiple_of=lanes, source="MLAS packs convolutions in blocks of one vector of channels"),
        cautions=tuple(_cautions(roofline)),
    )  # fmt: skip


def _figure(measured: Measurement) -> Figure:
    basis: Basis = "measured"
    said = ", ".join(f"{key} {value}" for key, value in measured.conditions.items())
    return Figure(value=measured.value, basis=basis, source=f"Measured on this machine: {said}")


def _cautions(roofline: Roofline) -> list[Caution]:
    found = [
        Caution(what="Times jump between two levels where others use a core; quiet the machine, or use one thread"),
        Caution(
            when="small layers",
            what="Layers this short cost more to start than to compute; try one thread and larger batches",
        ),
    ]  # fmt: skip
    if platform.machine().lower() in {"x86_64", "amd64"} and saturates_int8():
        found.append(Caution(when="int8", what="No VNNI here: pairs of uint8 x int8 products saturate at 16 bits, and "
                             "ONNX Runtime is asked for the slower exact kernels"))  # fmt: skip
    if roofline.peaks["int8"].value < 1.5 * roofline.peaks["fp32"].value:
        found.append(
            Caution(when="int8", what="int8 products are hardly faster than float here; what they save is bytes")
        )
    return found
