"""What a datasheet says of a piece of work: the roofline, with the efficiencies that the profile's coefficients give.

The roofline (Williams, Waterman & Patterson 2009) is the longer of computing and moving the bytes; `kernel_seconds`,
what the device takes for the smallest piece, comes on top. It prices work that nothing was measured for, and it is
what the efficiency of a measured sample is counted against.

Coefficients read here, each a fraction of a peak unless said, more specific names first:
  matmul_efficiency         what a large product reaches; matmul_half_size: the edge (elements) that reaches half of it
  matmul_memory_efficiency  what a skinny product reaches of the memory bandwidth
  attention_efficiency.<backend>.<form>, attention_efficiency.<form>; attention_half_keys, by the same names: the keys
                            that reach half of it; attention_half_width, by the same names: the head width that reaches
                            half of it, where scores are written out, which takes as long for any width
  attention_memory_efficiency, memory_efficiency.<op>, memory_efficiency, optimizer_efficiency,
                            host_optimizer_efficiency
  host_link_bandwidth.<direction>, host_link_bandwidth, disk_bandwidth.<direction>, disk_bandwidth (bytes/s);
  pageable_efficiency; launch_seconds (of the host, one operation); kernel_seconds
"""

from __future__ import annotations

from math import cbrt

from autotune.spec.errors import Problem, UsageError
from autotune.spec.machine import Profile
from autotune.spec.work import BYTES, FEW_ROWS, Attention, Copy, Matmul, Memory, Optimizer


class Roofline:
    """Times from the facts and coefficients of one profile. All in seconds, bytes and floating-point operations."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._coefficients = profile.coefficients
        self.bandwidth = profile.device.memory_bandwidth
        self.memory_efficiency = self.coefficient("memory_efficiency", default=1.0)
        self.kernel_seconds = self._kernel_seconds()

    def coefficient(self, *names: str, default: float) -> float:
        """The first of `names` that the profile has."""
        for name in names:
            if name in self._coefficients:
                return self._coefficients[name]
        return default

    def peak(self, dtype: str) -> float:
        """Operations a second in `dtype`. One the profile does not list: that of the nearest width, slower in
        proportion where the asked one is wider and no faster where it is narrower."""
        peaks = self._profile.device.peak_flops
        if dtype in peaks:
            return peaks[dtype]
        near = min(peaks, key=lambda known: (abs(BYTES[known] - BYTES[dtype]), known))
        return peaks[near] * min(1.0, BYTES[near] / BYTES[dtype])

    def ideal(self, work: Matmul | Attention) -> float:
        """The roofline at full efficiency, and the least time of a kernel."""
        return max(work.flops / self.peak(work.dtype), work.bytes / self.bandwidth) + self.kernel_seconds

    def computes(self, work: Matmul | Attention) -> bool:
        """Whether `work` is bound by computing rather than by memory."""
        return work.flops / self.peak(work.dtype) >= work.bytes / self.bandwidth

    def moving(self, work: Matmul | Attention) -> float:
        """The memory side alone, at the efficiency that such work reaches."""
        name = "matmul_memory_efficiency" if isinstance(work, Matmul) else "attention_memory_efficiency"
        return work.bytes / (self.bandwidth * self.coefficient(name, default=self.memory_efficiency))

    def computing(self, work: Matmul | Attention) -> float:
        """The compute side alone: a share s / (s + half) of the best efficiency at size s, so that small work reaches
        less. s of a product is the edge of the cube of equal work, of attention the keys."""
        if isinstance(work, Matmul):
            best = self.coefficient("matmul_efficiency", default=1.0)
            size, half = cbrt(work.flops / 2), self.coefficient("matmul_half_size", default=0.0)
        else:
            most, less = f".{work.backend}.{work.form}", f".{work.form}"
            names = f"attention_efficiency{most}", f"attention_efficiency{less}", "matmul_efficiency"
            best = self.coefficient(*names, default=1.0)
            names = f"attention_half_keys{most}", f"attention_half_keys{less}", "attention_half_keys"
            size, half = float(work.keys), self.coefficient(*names, default=0.0)
            names = f"attention_half_width{most}", f"attention_half_width{less}", "attention_half_width"
            best *= work.head_dim / (work.head_dim + self.coefficient(*names, default=0.0))
        return work.flops / (self.peak(work.dtype) * best * size / (size + half))

    def dense(self, work: Matmul | Attention) -> float:
        return max(self.computing(work), self.moving(work)) + self.kernel_seconds

    def widening(self, work: Matmul | Attention) -> float:
        """What a product with weights of a byte takes beyond a plain one with more tokens than kernels of ours
        multiply: the weight is read, written as wide as x, and read again as that."""
        if not isinstance(work, Matmul) or work.form != "int8" or work.m <= FEW_ROWS:
            return 0.0
        moved = work.batch * work.k * work.n * 2 * BYTES[work.dtype]
        return moved / (self.bandwidth * self.memory_efficiency) + self.kernel_seconds

    def memory(self, work: Memory | Optimizer) -> float:
        name = f"memory_efficiency.{work.op}" if isinstance(work, Memory) else "optimizer_efficiency"
        efficiency = self.coefficient(name, default=self.memory_efficiency)
        return work.bytes / (self.bandwidth * efficiency) + self.kernel_seconds

    def on_host(self, work: Optimizer) -> float:
        """An update by the host's processor, bound by its memory."""
        rate = self._profile.host.memory_bandwidth
        if not rate:
            raise self._missing("host.memory_bandwidth", "bytes/s of the host's memory")
        return work.bytes / (rate * self.coefficient("host_optimizer_efficiency", default=self.memory_efficiency))

    def copy_rate(self, work: Copy) -> float:
        """Bytes of `size` a second, at best. A copy inside one memory reads and writes each byte.

        UsageError where the profile gives no figure for the direction.
        """
        device, host = self._profile.device, self._profile.host
        inside = (host.memory_bandwidth or (device.memory_bandwidth if device.kind == "cpu" else 0.0)) / 2
        if work.direction == "d2d":
            return device.memory_bandwidth / 2
        if work.direction.startswith("disk"):
            names = (f"disk_bandwidth.{work.direction}", "disk_bandwidth")
            rate = self.coefficient(*names, default=0.0)
        elif work.direction == "h2h" or device.kind == "cpu":
            names, rate = ("host.memory_bandwidth", ""), inside
        else:
            names = (f"host_link_bandwidth.{work.direction}", "host_link_bandwidth")
            rate = self.coefficient(*names, default=inside)
        if not rate:
            raise self._missing(names[0], f"bytes/s of a {work.direction} copy")
        return rate

    def copy(self, work: Copy) -> float:
        efficiency = 1.0
        if work.direction == "d2d":
            efficiency = self.memory_efficiency
        elif not work.pinned and work.direction in ("h2d", "d2h"):
            efficiency = self.coefficient("pageable_efficiency", default=1.0)
        return work.size / (self.copy_rate(work) * efficiency) + self.kernel_seconds

    def launch(self) -> float:
        """Host seconds of handing over one operation."""
        if "launch_seconds" not in self._coefficients:
            raise self._missing("launch_seconds", "seconds of one launch, or a launch sample")
        return self._coefficients["launch_seconds"]

    def _missing(self, name: str, wanted: str) -> UsageError:
        key = name if "." in name and name.startswith("host.") else f"coefficients.{name}"
        problem = Problem(self._profile.name, key, "nothing", wanted)
        return UsageError("the machine profile has no figure for what the plan needs", problems=[problem])

    def _kernel_seconds(self) -> float:
        """The coefficient, or the least time that any piece of device work was measured to take."""
        if "kernel_seconds" in self._coefficients:
            return self._coefficients["kernel_seconds"]
        kinds = ("matmul", "attention", "memory", "optimizer")
        return min((s.seconds for s in self._profile.samples if s.work.kind in kinds), default=0.0)
