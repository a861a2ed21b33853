//! From how many tokens on a sparse layer is faster than a dense one: estimates of both, so that a layer with fewer can run dense.
//!
//! Fitted to an H200 and an H100 (docs/kernels.md): 312 layers of `rtlynx bench gemm --shapes small` on each, rank 64. `benches/results/*/layer_small.csv`
//! has them, and tests hold this file against them. On other GPUs nothing has been measured, so there the answer is 0: always sparse.

use crate::dispatch::{self, Arch};
use crate::error::Result;
use crate::format::{BLOCK_COLS, ceil_div};
use crate::problem::{SparseLinearProblem, SparsifyProblem};
use crate::prologue::Prologue;

/// Beyond this many tokens a layer that still loses is taken to lose always.
const MOST_TOKENS: i64 = 1 << 14;
/// Thresholds are looked for in steps of so many tokens.
const STEP: i64 = 64;
/// By how many percent the sparse layer may be estimated slower beyond the threshold: where a few more tokens begin another wave of tiles. The
/// estimate exaggerates those; of the measured layers none loses (a test below).
const SLACK_PERCENT: i64 = 8;
/// By how many percent it must be estimated faster at the threshold: with few tokens the estimates are least sure.
const MARGIN_PERCENT: i64 = 12;
/// What the memory of an H200 could give at most, in 10⁹ bytes a second. Estimates are for it, and grow where memory is slower: by how much, an H100 told.
const H200_GB_S: i64 = 4916;

/// An estimated time on a GPU of slower memory: longer by `percent` of what moving bytes takes longer.
fn with_memory(ns: i64, memory_gb_s: i64, percent: i64) -> i64 {
    let missing = (H200_GB_S - memory_gb_s).max(0);
    ns.saturating_add(ns / 100 * percent * missing / memory_gb_s.max(1))
}

/// The least number of tokens with which the sparse layer is estimated to be faster than the dense one by a margin, and with no larger number slower by
/// more than some percent; `i64::MAX` if there is none. Of `problem`, m is ignored.
pub fn least_tokens(arch: &Arch, memory_gb_s: i64, problem: &SparseLinearProblem) -> Result<i64> {
    dispatch::plan_sparse_linear(arch, &SparseLinearProblem { m: 1, ..*problem })?;
    if arch.capability != (9, 0) {
        return Ok(0);
    }
    let mut least = i64::MAX;
    for m in (STEP..=MOST_TOKENS).rev().step_by(STEP as usize) {
        let problem = SparseLinearProblem { m, ..*problem };
        let (sparse, dense) = (sparse_ns(arch, memory_gb_s, &problem)?, dense_ns(&problem));
        if sparse > dense.saturating_add(dense / 100 * SLACK_PERCENT) {
            break;
        }
        if sparse <= dense - dense / 100 * MARGIN_PERCENT {
            least = m;
        }
    }
    Ok(least)
}

/// `F.linear`: 745 TFLOP/s, or 3.5 TB/s where reading the weight takes longer.
fn dense_ns(problem: &SparseLinearProblem) -> i64 {
    const CALL_NS: i64 = 7000;
    let SparseLinearProblem { m, n, k, .. } = *problem;
    // Sizes that are valid one by one may be beyond all time together.
    let flop = n.saturating_mul(k).saturating_mul(2 * m);
    let bytes = n.saturating_mul(k).saturating_add(m * (n + k)).saturating_mul(2);
    CALL_NS + (flop / 745_000).max(bytes / 3500)
}

/// Selection and GEMM, one after the other. The GEMM reads its weight at 2.6 TB/s where that takes longer.
fn sparse_ns(arch: &Arch, memory_gb_s: i64, problem: &SparseLinearProblem) -> Result<i64> {
    const CALL_NS: i64 = 4000;
    const SELECT_PERCENT: i64 = 70;
    const BYTES_PERCENT: i64 = 100;
    let gemm_percent = if problem.dtype.has_e4m3_operands() { 0 } else { 30 };
    let select_ns = with_memory(select_ns(arch, problem)?, memory_gb_s, SELECT_PERCENT);
    let gemm_ns = dispatch::estimated_gemm_ns(arch, problem)?;
    let weight_bytes = problem.n.saturating_mul(problem.k).saturating_mul(problem.dtype.operand_bytes());
    let gemm_ns = with_memory(gemm_ns, memory_gb_s, gemm_percent).max(with_memory(weight_bytes / 2600, memory_gb_s, BYTES_PERCENT));
    Ok(CALL_NS + select_ns + gemm_ns)
}

/// Selection on the kernel for Hopper.
fn select_ns(arch: &Arch, problem: &SparseLinearProblem) -> Result<i64> {
    let SparseLinearProblem { dtype, m, k, rank, .. } = *problem;
    let select = SparsifyProblem {
        dtype,
        m,
        k,
        ldx: k,
        prologue: Prologue::default(),
        gathered: false,
        rank,
        norm_compensation: true,
        branch_of_dropped: true,
        eps: 0.0,
        values_scale: 1.0,
    };
    let (_, launch) = dispatch::plan_sparsify(arch, &select)?;
    let cluster = i64::from(launch.cluster);
    Ok(dispatch::estimated_select_ns(arch, i64::from(launch.blocks.0) / cluster, ceil_div(k, BLOCK_COLS), cluster))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;

    fn h200() -> Arch {
        Arch::from_capability((9, 0), 132)
    }

    fn problem(m: i64, n: i64, k: i64) -> SparseLinearProblem {
        SparseLinearProblem { dtype: Dtype::Bf16, m, n, k, rank: 64 }
    }

    #[test]
    fn wide_layers_win_early_and_small_ones_never() {
        let least = |n, k| least_tokens(&h200(), H200_GB_S, &problem(0, n, k)).unwrap();
        assert!(least(21504, 3072) < 1024, "{}", least(21504, 3072));
        assert!((1024..=4096).contains(&least(3072, 3072)), "{}", least(3072, 3072));
        assert!((1024..=4096).contains(&least(3072, 12288)), "{}", least(3072, 12288));
        assert_eq!(least(1152, 1152), i64::MAX);
    }

    #[test]
    fn the_estimate_holds_from_there_on() {
        let least = |n, k| least_tokens(&h200(), H200_GB_S, &problem(0, n, k)).unwrap();
        for (n, k) in [(3072, 3072), (12288, 3072), (3072, 15360), (3840, 10240), (55296, 6144)] {
            let ratio = |m| sparse_ns(&h200(), H200_GB_S, &problem(m, n, k)).unwrap() as f64 / dense_ns(&problem(m, n, k)) as f64;
            assert!(ratio(least(n, k)) <= 1.0, "{n} {k}");
            assert!((least(n, k)..=MOST_TOKENS).step_by(STEP as usize).all(|m| ratio(m) < 1.09), "{n} {k}");
        }
    }

    macro_rules! results {
        ($gpu:literal) => {
            [
                include_str!(concat!("../../../benches/results/", $gpu, "/layer_small.csv")),
                include_str!(concat!("../../../benches/results/", $gpu, "/layer.csv")),
                include_str!(concat!("../../../benches/results/", $gpu, "/layer_odd.csv")),
            ]
        };
    }
    const H200: [&str; 3] = results!("nvidia-h200");
    const H100: [&str; 3] = results!("nvidia-h100-80gb-hbm3");
    const H100_GB_S: i64 = 3352;

    /// Of a result file, the layers that would run sparse: what the dense product takes over what the sparse one does. Also how many would run dense.
    fn speedups(file: &str, memory_gb_s: i64, dtype: Dtype, layer: &str) -> (Vec<(String, f64)>, usize) {
        let mut lines = file.lines().filter(|line| !line.starts_with('#'));
        let header: Vec<&str> = lines.next().unwrap().split(',').collect();
        let column = |name| header.iter().position(|&field| field == name).unwrap();
        let (mut found, mut dense) = (Vec::new(), 0);
        for line in lines {
            let fields: Vec<&str> = line.split(',').collect();
            let size = |name| fields[column(name)].parse::<i64>().unwrap();
            let ms = |name| fields[column(name)].parse::<f64>().unwrap();
            let problem = SparseLinearProblem { dtype, ..problem(0, size("n"), size("k")) };
            if size("m") < least_tokens(&h200(), memory_gb_s, &problem).unwrap() {
                dense += 1;
            } else {
                found.push((line.to_owned(), ms("dense_ms") / ms(layer)));
            }
        }
        (found, dense)
    }

    /// No measured layer that would run sparse was more than 2 % slower than the dense one.
    #[test]
    fn no_measured_layer_loses() {
        for (files, memory_gb_s, dtype, layer) in [
            (H200, H200_GB_S, Dtype::Bf16, "layer_ms"),
            (H200, H200_GB_S, Dtype::Bf16E4m3, "layer_e4m3_ms"),
            (H100, H100_GB_S, Dtype::Bf16, "layer_ms"),
            (H100, H100_GB_S, Dtype::Bf16E4m3, "layer_e4m3_ms"),
        ] {
            let (found, dense): (Vec<_>, Vec<_>) = files.map(|file| speedups(file, memory_gb_s, dtype, layer)).into_iter().unzip();
            let (found, dense) = (found.concat(), dense.iter().sum::<usize>());
            assert!(found.len() > 20 && dense > 20, "{memory_gb_s} {dtype}: {} sparse, {dense} dense", found.len());
            let losing: Vec<_> = found.iter().filter(|(_, speedup)| *speedup < 0.98).collect();
            assert!(losing.is_empty(), "{memory_gb_s} {dtype}: {losing:#?}");
        }
    }

    #[test]
    fn slower_memory_asks_for_more_tokens() {
        for (n, k) in [(3072, 12288), (3072, 15360), (12288, 3072), (3840, 10240)] {
            let least = |memory_gb_s| least_tokens(&h200(), memory_gb_s, &problem(0, n, k)).unwrap();
            assert!(least(H100_GB_S) >= least(H200_GB_S), "{n} {k}");
            assert_eq!(least(2 * H200_GB_S), least(H200_GB_S));
        }
    }

    #[test]
    fn where_nothing_is_measured_layers_are_sparse() {
        assert_eq!(least_tokens(&Arch::from_capability((8, 0), 108), H200_GB_S, &problem(0, 1152, 1152)), Ok(0));
        assert!(least_tokens(&Arch::from_capability((7, 5), 40), H200_GB_S, &problem(0, 64, 64)).is_err());
        assert!(least_tokens(&h200(), H200_GB_S, &problem(0, 65, 64)).is_err());
    }
}
