//! What the tensor cores of Hopper give when nothing has to be loaded: the limit that the benches hold the kernels against.

use crate::config::{Kernel, Launch, ProbeKernel};
use crate::device;
use crate::error::{Error, Result};
use crate::launch::{Place, enqueue};
use crate::params::{Address, ProbeParams};

/// Name of the operation in errors.
pub const PROBE: &str = "probe";

/// Device addresses of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbeTensors {
    /// The operands, byte for byte as shared memory holds them; [`ProbeKernel::shared_bytes`] of them, aligned to 16
    pub data: Address,
    /// metadata of 256 rows and 64 columns, in the compressed format; dense probes do not read it
    pub metadata: Address,
    /// `[multiprocessors, 256]` f32, written: the sum of each thread's accumulators
    pub sums: Address,
    /// `[multiprocessors, 256]` i64, written: the clocks each thread took
    pub cycles: Address,
}

/// The probe of a name: `dense_ss`, `dense_rs`, `sparse_ss` or `sparse_rs`.
pub fn parse(name: &str) -> Result<ProbeKernel> {
    let symbol = format!("probe_sm90_{name}");
    let unknown = || Error::invalid(PROBE, "name", name, "dense_ss, dense_rs, sparse_ss or sparse_rs");
    ProbeKernel::all().find(|kernel| kernel.to_string() == symbol).ok_or_else(unknown)
}

/// Multiplies 256 × 64 by 64 × 192 on every multiprocessor, `steps` times. Returns once the kernel is enqueued; nothing is launched on an
/// error.
///
/// # Safety
///
/// The addresses in `tensors` must be device memory of `place.device` as [`ProbeTensors`] states, alive and not used elsewhere until the
/// stream has run the kernel. `place.stream` must be a live stream.
pub unsafe fn probe(place: Place, kernel: ProbeKernel, steps: i64, tensors: &ProbeTensors) -> Result<()> {
    let in_range = i32::try_from(steps).ok().filter(|&steps| steps > 0);
    let steps = in_range.ok_or_else(|| Error::invalid(PROBE, "steps", steps, "1 to 2^31 - 1"))?;
    let ProbeTensors { data, metadata, sums, cycles } = *tensors;
    for (argument, address) in [("data", data), ("metadata", metadata), ("sums", sums), ("cycles", cycles)] {
        if address == 0 || address % 16 != 0 {
            return Err(Error::invalid(PROBE, argument, format!("address {address:#x}"), "device memory aligned to 16 bytes"));
        }
    }
    let arch = device::arch(PROBE, place.device)?;
    if arch.capability != (9, 0) {
        let got = format!("a GPU of compute capability {}.{}", arch.capability.0, arch.capability.1);
        return Err(Error::invalid(PROBE, "device_index", got, "one of compute capability 9.0"));
    }
    let shared_bytes = kernel.shared_bytes();
    let launch = Launch { blocks: (arch.sms as u32, 1), cluster: 1, threads: ProbeKernel::THREADS, shared_bytes, overlaps: false };
    let params = ProbeParams { data, metadata, sums, cycles, steps };
    // SAFETY: these are the parameters of every probe; the caller vouches for what they point to.
    unsafe { enqueue(place, Kernel::Probe(kernel), launch, || Ok(params)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOME: ProbeTensors = ProbeTensors { data: 256, metadata: 256, sums: 256, cycles: 256 };
    const NOWHERE: Place = Place { device: 0, stream: 0 };

    #[test]
    fn every_probe_has_its_name() {
        let names = ["dense_ss", "dense_rs", "sparse_ss", "sparse_rs"];
        let kernels = names.map(|name| parse(name).unwrap());
        assert_eq!(kernels.map(|kernel| kernel.to_string()), names.map(|name| format!("probe_sm90_{name}")));
        assert!(ProbeKernel::all().eq(kernels));
        assert!(matches!(parse("sparse"), Err(Error::InvalidArgument { argument: "name", .. })));
    }

    #[test]
    fn shared_memory_is_what_the_kernel_lays_out() {
        assert_eq!(["dense_ss", "sparse_rs"].map(|name| parse(name).unwrap().shared_bytes()), [57344, 40960]);
    }

    #[test]
    fn bad_arguments_are_refused_before_the_driver_is_asked() {
        let refused = |steps, tensors| {
            // SAFETY: nothing is launched with one of these.
            match unsafe { probe(NOWHERE, ProbeKernel { sparse: true, from_registers: false }, steps, &tensors) } {
                Err(Error::InvalidArgument { argument, .. }) => argument,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(["steps", "steps"], [refused(0, SOME), refused(1 << 31, SOME)]);
        assert_eq!("data", refused(1, ProbeTensors { data: 0, ..SOME }));
        assert_eq!("cycles", refused(1, ProbeTensors { cycles: 8, ..SOME }));
    }
}
