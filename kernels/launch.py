"""Kernels on the GPU at hand: their machine code, launches on PyTorch's stream, tensor maps for Hopper."""

from __future__ import annotations

import ctypes
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from kernels.compile import Build, CompileError, compile_cubin


def architecture_of(device: torch.device) -> str:
    """The architecture to compile for: Hopper's own instructions need its name with an ``a``."""
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 0):
        raise CompileError(
            f"{torch.cuda.get_device_name(device)} is sm_{major}{minor}; the kernels need sm_80 or newer"
        )
    return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"


@cache
def _load(build: Build, index: int) -> Any:
    """A build's machine code on GPU ``index``."""
    from cuda.core import Device, ObjectCode

    Device(index).set_current()  # PyTorch's own context
    cubin = compile_cubin(build, architecture_of(torch.device("cuda", index)))
    return ObjectCode.from_cubin(cubin, name=build.source)


class Kernel:
    """One kernel of a build, ready to launch.

    Calling it launches on PyTorch's current stream, so that it can be captured in a CUDA Graph. Arguments: tensors
    pass their address, ``None`` a null pointer, everything else must be a ctypes value, whose type has to be the
    parameter's: nothing checks that.
    """

    def __init__(self, build: Build, name: str, device: torch.device, *, shared_bytes: int = 0):
        """shared_bytes: dynamic shared memory of each block."""
        from cuda.bindings import driver
        from cuda.core import Device

        index = torch.cuda.current_device() if device.index is None else device.index
        self._kernel = _load(build, index).get_kernel(name)
        self._shared_bytes = shared_bytes
        if shared_bytes > 48 * 1024:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            handle = driver.CUkernel(int(self._kernel.handle))
            (error,) = driver.cuKernelSetAttribute(attribute, shared_bytes, handle, Device(index).device_id)
            if error != driver.CUresult.CUDA_SUCCESS:
                raise RuntimeError(f"{build}: {shared_bytes} bytes of shared memory a block are refused: {error.name}")

    def __call__(
        self,
        grid: int | tuple[int, ...],
        block: int | tuple[int, ...],
        *arguments: Any,
        cluster: int | tuple[int, ...] | None = None,
    ) -> None:
        """grid: in blocks, or in clusters where ``cluster`` gives the blocks of one."""
        from cuda.core import launch

        stream = torch.cuda.current_stream().cuda_stream
        launch(
            _stream(stream), _config(grid, block, cluster, self._shared_bytes), self._kernel, *map(_value, arguments)
        )


@cache
def _stream(handle: int) -> Any:
    from cuda.core import Stream

    return Stream.from_handle(handle)


@cache
def _config(grid: Any, block: Any, cluster: Any, shared_bytes: int) -> Any:
    from cuda.core import LaunchConfig

    return LaunchConfig(grid=grid, block=block, cluster=cluster, shmem_size=shared_bytes)


def _value(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if argument is None:
        return 0
    if isinstance(argument, ctypes._SimpleCData):
        return argument
    if type(argument).__name__ == "TensorMapDescriptor":  # from tensor_map; a __grid_constant__ TensorMap parameter
        return argument
    raise TypeError(f"a kernel takes tensors, None and ctypes values, not {type(argument).__name__}")


class _Memory:
    """An address with a shape, for cuda-python: it does not keep the memory, as a tensor would."""

    def __init__(self, address: int, shape: tuple[int, ...], strides: tuple[int, ...] | None, kind: str):
        self.__cuda_array_interface__ = {
            "version": 3,
            "typestr": kind,
            "shape": shape,
            "strides": strides,
            "data": (address, False),
        }


@lru_cache(maxsize=4096)
def _tensor_map(
    address: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None,
    box: tuple[int, ...],
    index: int,
    kind: str,
    swizzled: bool,
) -> Any:
    from cuda.core import Device
    from cuda.core.utils import StridedMemoryView

    Device(index).set_current()
    view = StridedMemoryView.from_cuda_array_interface(_Memory(address, shape, strides, kind), stream_ptr=-1)
    swizzles, promotion = _tensor_map_enums()
    swizzle = swizzles.SWIZZLE_128B if swizzled else swizzles.NONE
    return view.as_tensor_map(box_dim=box, swizzle=swizzle, l2_promotion=promotion)


def _tensor_map_enums() -> tuple[Any, Any]:
    from cuda.core import _tensor_map as enums  # NOTES: 1.2 takes these enumerations and exports them nowhere else

    return enums.TensorMapSwizzle, enums.TensorMapL2Promotion.L2_128B


def tensor_map(
    tensor: Tensor,
    box: tuple[int, ...],
    shape: tuple[int, ...] | None = None,
    *,
    strides: tuple[int, ...] | None = None,
    swizzled: bool = True,
) -> Any:
    """What Hopper's copy engine needs to know of a contiguous FP16, FP32 or byte tensor; an argument for a ``Kernel``.

    box: what one copy moves, outermost first as in ``shape`` (by default the tensor's own; at most 5 dimensions).
    strides: of ``shape``, in bytes, where they are not those of an array without gaps. Where ``swizzled``, a box's
    innermost extent is one row of 128 bytes and is stored with the 128-byte swizzle. What lies outside of the tensor is
    read as zeros and not written. Maps are kept by address and shape, which decide all that is in them, so a replay of
    a CUDA Graph, which finds its tensors where they were, finds its maps right too.
    """
    index = torch.cuda.current_device() if tensor.device.index is None else tensor.device.index
    kind = {torch.float16: "<f2", torch.float32: "<f4", torch.uint8: "|u1"}[tensor.dtype]
    extents = tuple(tensor.shape if shape is None else shape)
    return _tensor_map(tensor.data_ptr(), extents, strides, box, index, kind, swizzled)
