//! Which kernels were measured fastest for which problems: they go before what dispatch estimates. Who measures is not this crate's business.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{LazyLock, PoisonError, RwLock};

use crate::config::{Launch, SpmmKernel};
use crate::device;
use crate::dispatch::{self, Arch};
use crate::error::{Error, Result};
use crate::problem::{SPARSE_LINEAR, SparseLinearProblem};

/// By index of the GPU and problem, for the whole process.
static TABLE: LazyLock<RwLock<HashMap<(i32, SparseLinearProblem), SpmmKernel>>> = LazyLock::new(RwLock::default);
/// Whether the table holds anything: where nothing was tuned, a launch costs one load more and takes no lock.
static IN_USE: AtomicBool = AtomicBool::new(false);

/// Makes `sparse_linear` run the kernel of this name for a problem on a GPU; `None`: again what dispatch estimates to be fastest.
///
/// A kernel that cannot run the problem there is refused.
pub fn set(device: i32, problem: &SparseLinearProblem, kernel: Option<&str>) -> Result<()> {
    let arch = device::device(SPARSE_LINEAR, device)?.arch;
    let kernel = kernel.map(|name| find(&arch, problem, name)).transpose()?;
    put(device, problem, kernel);
    Ok(())
}

/// The GEMM kernel for a problem on a GPU: the tuned one if it can run there, else the one of least estimated time.
pub fn plan_sparse_linear(device: i32, arch: &Arch, problem: &SparseLinearProblem) -> Result<(SpmmKernel, Launch)> {
    if let Some(tuned) = get(device, problem) {
        // It can not where, since it was set, only the portable kernels are used.
        if let Some(plan) = dispatch::candidates(arch, problem)?.find(|(kernel, _)| *kernel == tuned) {
            return Ok(plan);
        }
    }
    dispatch::plan_sparse_linear(arch, problem)
}

/// The name of the kernel that `sparse_linear` launches for a problem on a GPU of this machine.
pub fn kernel(device: i32, problem: &SparseLinearProblem) -> Result<String> {
    let (kernel, _) = plan_sparse_linear(device, &device::arch(SPARSE_LINEAR, device)?, problem)?;
    Ok(kernel.to_string())
}

fn find(arch: &Arch, problem: &SparseLinearProblem, name: &str) -> Result<SpmmKernel> {
    let mut candidates = dispatch::candidates(arch, problem)?.map(|(kernel, _)| kernel);
    candidates.find(|kernel| kernel.to_string() == name).ok_or_else(|| {
        let names = dispatch::candidates(arch, problem).into_iter().flatten().map(|(kernel, _)| kernel.to_string());
        Error::invalid(SPARSE_LINEAR, "kernel", name, format!("one of {}", names.collect::<Vec<_>>().join(", ")))
    })
}

fn get(device: i32, problem: &SparseLinearProblem) -> Option<SpmmKernel> {
    if !IN_USE.load(Ordering::Relaxed) {
        return None;
    }
    TABLE.read().unwrap_or_else(PoisonError::into_inner).get(&(device, *problem)).copied()
}

fn put(device: i32, problem: &SparseLinearProblem, kernel: Option<SpmmKernel>) {
    let mut table = TABLE.write().unwrap_or_else(PoisonError::into_inner);
    match kernel {
        Some(kernel) => table.insert((device, *problem), kernel),
        None => table.remove(&(device, *problem)),
    };
    IN_USE.store(!table.is_empty(), Ordering::Relaxed);
}

/// The table is one for all tests: each has a device of its own.
#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;

    const PROBLEM: SparseLinearProblem = SparseLinearProblem { dtype: Dtype::Bf16, m: 4096, n: 3072, k: 3072, rank: 64 };

    fn h200() -> Arch {
        Arch::from_capability((9, 0), 132)
    }

    fn others() -> Vec<(SpmmKernel, Launch)> {
        let plan = dispatch::plan_sparse_linear(&h200(), &PROBLEM).unwrap();
        dispatch::candidates(&h200(), &PROBLEM).unwrap().filter(|candidate| *candidate != plan).collect()
    }

    #[test]
    fn a_tuned_kernel_goes_before_the_plan_until_it_is_taken_back() {
        let plan = || plan_sparse_linear(1, &h200(), &PROBLEM).unwrap();
        let before = plan();
        assert_eq!(before, dispatch::plan_sparse_linear(&h200(), &PROBLEM).unwrap());
        for other in others() {
            put(1, &PROBLEM, Some(other.0));
            assert_eq!(plan(), other);
        }
        put(1, &PROBLEM, None);
        assert_eq!(plan(), before);
    }

    #[test]
    fn it_is_for_one_problem_on_one_gpu() {
        put(2, &PROBLEM, Some(others()[0].0));
        let changed = [
            SparseLinearProblem { m: 4095, ..PROBLEM },
            SparseLinearProblem { rank: 48, ..PROBLEM },
            SparseLinearProblem { dtype: Dtype::F16, ..PROBLEM },
        ];
        for (device, problem) in changed.map(|problem| (2, problem)).into_iter().chain([(3, PROBLEM)]) {
            assert_eq!(plan_sparse_linear(device, &h200(), &problem), dispatch::plan_sparse_linear(&h200(), &problem));
        }
    }

    #[test]
    fn one_that_cannot_run_is_passed_over() {
        let hopper = others().into_iter().find(|(kernel, _)| kernel.to_string().starts_with("spmm_sm90")).unwrap();
        put(4, &PROBLEM, Some(hopper.0));
        let portable = h200().portable();
        assert_eq!(plan_sparse_linear(4, &portable, &PROBLEM), dispatch::plan_sparse_linear(&portable, &PROBLEM));
        assert_eq!(plan_sparse_linear(4, &h200(), &PROBLEM), Ok(hopper));
    }

    #[test]
    fn names_are_found_and_others_refused_with_a_list() {
        for (kernel, _) in others() {
            assert_eq!(find(&h200(), &PROBLEM, &kernel.to_string()), Ok(kernel));
        }
        let ampere = Arch::from_capability((8, 0), 108);
        for (arch, name) in [(h200(), "spmm"), (h200(), "spmm_sm80_f16_64x64x64_s4"), (ampere, "spmm_sm90_bf16_256x192x64_s5")] {
            let refused = find(&arch, &PROBLEM, name).unwrap_err();
            assert!(matches!(refused, Error::InvalidArgument { argument: "kernel", .. }), "{refused}");
            assert!(refused.to_string().contains("spmm_sm80_bf16_128x128x64_s4, spmm_sm80_bf16_128x64x64_s4"), "{refused}");
        }
        let bad = SparseLinearProblem { n: 65, ..PROBLEM };
        assert!(matches!(find(&h200(), &bad, "spmm"), Err(Error::InvalidArgument { argument: "n", .. })));
    }
}
