//! Which kernel runs, with what geometry: pure functions of (architecture, problem) over printable values, tested without a GPU.

use crate::config::{Family, Launch, SparsifyKernel, SpmmKernel, TILES, Tile};
use crate::error::{Error, Result};
use crate::format::{BLOCK_COLS, ceil_div, padded_rows};
use crate::problem::{SPARSE_LINEAR, SPARSIFY, SparseLinearProblem, SparsifyProblem};
use crate::prologue::Activation;

/// What dispatch needs to know of a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arch {
    /// Compute capability.
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub sms: i64,
    /// Most shared memory one block may use, in bytes.
    pub shared_bytes: i64,
}

impl Arch {
    /// An architecture that is not present: shared memory as in the CUDA C++ Programming Guide, table of technical specifications.
    /// A capability the table does not name gets the smallest of them all.
    pub fn from_capability(capability: (u32, u32), sms: i64) -> Self {
        let kib = match capability {
            (8, 0 | 7) => 163,
            (9..=11, _) => 227,
            _ => 99,
        };
        Self { capability, sms, shared_bytes: kib * 1024 }
    }

    /// The same GPU without the instructions that only it has.
    pub fn portable(self) -> Self {
        Self { capability: self.capability.min((8, 0)), ..self }
    }

    /// Whether the kernels of a family run here.
    fn has(&self, family: Family) -> bool {
        match family {
            Family::Sm80 => self.capability >= (8, 0),
            // The successors of Hopper do not have its instructions.
            Family::Sm90 => self.capability == (9, 0),
        }
    }

    /// Whether the kernels of a tile run here and a block of it fits.
    fn runs(&self, tile: &Tile) -> bool {
        self.has(tile.family) && tile.shared_bytes() <= self.shared_bytes
    }

    pub(crate) fn require_sparse_tensor_cores(&self, op: &'static str) -> Result<()> {
        if self.capability >= (8, 0) { Ok(()) } else { Err(Error::UnsupportedArch { op, capability: self.capability }) }
    }
}

/// The sparsify kernel of the smallest sufficient rank capacity. Rows are divided among blocks, or clusters of blocks, along x; ranks above
/// the largest capacity take several blocks along y.
pub fn plan_sparsify(arch: &Arch, problem: &SparsifyProblem) -> Result<(SparsifyKernel, Launch)> {
    problem.validate()?;
    arch.require_sparse_tensor_cores(SPARSIFY)?;
    let [.., largest] = SparsifyKernel::CAPACITIES;
    let capacity = SparsifyKernel::CAPACITIES.into_iter().find(|&capacity| capacity >= problem.rank).unwrap_or(largest);
    let family = sparsify_family(arch);
    if !family.dtypes().contains(&problem.dtype) {
        return Err(Error::UnsupportedPrecision { op: SPARSIFY, capability: arch.capability });
    }
    let activation = problem.prologue.activation;
    if !family.activations().any(|known| known == activation) {
        return Err(Error::UnsupportedActivation { op: SPARSIFY, capability: arch.capability });
    }
    let kernel = SparsifyKernel { family, dtype: problem.dtype, capacity, activation, gathered: problem.gathered };
    // Padding rows too: the metadata describes them, and the GEMM reads it whole.
    let row_blocks = ceil_div(padded_rows(problem.m), kernel.rows());
    let rank_blocks = if problem.rank > 0 { ceil_div(problem.rank, capacity) } else { 1 };
    let cluster = match family {
        Family::Sm80 => 1,
        Family::Sm90 => cluster(arch, row_blocks, ceil_div(problem.k, BLOCK_COLS)),
    };
    let launch = Launch {
        blocks: ((row_blocks * cluster) as u32, rank_blocks as u32),
        cluster: cluster as u32,
        threads: kernel.threads(),
        shared_bytes: kernel.shared_bytes(),
        overlaps: false,
    };
    Ok((kernel, launch))
}

/// What the sparsify kernels of a GPU can apply to x themselves.
pub fn activations(arch: &Arch) -> impl Iterator<Item = Activation> {
    sparsify_family(arch).activations()
}

fn sparsify_family(arch: &Arch) -> Family {
    if arch.has(Family::Sm90) { Family::Sm90 } else { Family::Sm80 }
}

/// Blocks of a cluster, which share the columns of 64 rows: as many as are estimated to take least time. `column_blocks` is how often the columns can
/// be shared out.
fn cluster(arch: &Arch, row_blocks: i64, column_blocks: i64) -> i64 {
    let sizes = 1..=SparsifyKernel::MAX_CLUSTER.min(column_blocks);
    sizes.min_by_key(|&size| estimated_select_ns(arch, row_blocks, column_blocks, size)).expect("a row has columns")
}

/// Estimated time of `sparsify_sm90` in clusters of this size on an H200, fitted to sizes 1 to 8 for 70 sizes of X (docs/kernels.md). The size of least
/// estimated time took 0.2 % longer than the fastest, on average.
///
/// A block needs 0.8 us for a stage of 64 rows and 128 columns when it has a multiprocessor for itself, and two together need 1.5 us; more wait for the
/// next wave. Clusters of more than two do not find room on every multiprocessor, those of 7 least of all: the 16 or 18 of a GPC hold two. What a
/// cluster costs besides, its blocks' sums, grows with it.
pub(crate) fn estimated_select_ns(arch: &Arch, row_blocks: i64, column_blocks: i64, cluster: i64) -> i64 {
    const WAVE_NS: i64 = 6500; // besides its stages
    const BLOCK_NS: i64 = 260; // of a cluster
    const STAGES_OF_A_COLUMN_BLOCK: i64 = 2;
    const STAGE_NS: i64 = 820; // of a block alone
    const STAGE_OF_TWO_NS: i64 = 1530;
    let stages = STAGES_OF_A_COLUMN_BLOCK * ceil_div(column_blocks, cluster);
    let tenths = match cluster {
        1 | 2 => 10,
        7 => 8,
        _ => 9,
    };
    let places = (arch.sms * tenths / 10).max(1);
    let blocks = row_blocks * cluster;
    let waves = ceil_div(blocks, 2 * places) - 1; // before the last
    let stage_ns = if blocks - waves * 2 * places > places { STAGE_OF_TWO_NS } else { STAGE_NS };
    BLOCK_NS * cluster + waves * (WAVE_NS + stages * STAGE_OF_TWO_NS) + WAVE_NS + stages * stage_ns
}

/// The GEMM kernels that can run a problem, in the order of the tile table.
pub fn candidates(arch: &Arch, problem: &SparseLinearProblem) -> Result<impl Iterator<Item = (SpmmKernel, Launch)>> {
    problem.validate()?;
    arch.require_sparse_tensor_cores(SPARSE_LINEAR)?;
    Ok(TILES.into_iter().filter(|tile| tile.family.dtypes().contains(&problem.dtype)).filter_map(move |tile| {
        let tiles = tiles(&tile, problem);
        let blocks = if tile.persistent { tiles.min(arch.sms.max(1)) } else { tiles };
        let launch = Launch {
            blocks: (blocks as u32, 1),
            cluster: 1,
            threads: tile.threads,
            shared_bytes: tile.shared_bytes() as u32,
            overlaps: tile.overlaps || problem.dtype.has_e4m3_operands(),
        };
        // The kernels number their tiles with 32 bits.
        (arch.runs(&tile) && tiles <= i32::MAX.into()).then_some((SpmmKernel { dtype: problem.dtype, tile, epilogue: false }, launch))
    }))
}

/// The GEMM kernel of least estimated time, on a GPU that has kernels of its own one of those: with 77 tokens and with more they were all faster
/// than the others (docs/kernels.md).
pub fn plan_sparse_linear(arch: &Arch, problem: &SparseLinearProblem) -> Result<(SpmmKernel, Launch)> {
    let of_others = |tile: &Tile| arch.has(Family::Sm90) && tile.family != Family::Sm90;
    let cost = |tile: &Tile| (of_others(tile), estimated_ns(arch, tile, problem));
    // The smallest tile fits every GPU from 8.0 on, so that but for e4m3 only the number of tiles can leave no candidate.
    candidates(arch, problem)?.min_by_key(|(kernel, _)| cost(&kernel.tile)).ok_or_else(|| {
        if problem.dtype.has_e4m3_operands() && !arch.has(Family::Sm90) {
            return Error::UnsupportedPrecision { op: SPARSE_LINEAR, capability: arch.capability };
        }
        let got = format!("{} rows of {} outputs", problem.m, problem.n);
        Error::invalid(SPARSE_LINEAR, "m", got, "fewer than 2^31 output tiles")
    })
}

/// Estimated time of the GEMM that [`plan_sparse_linear`] chooses, which problem and GPU must allow.
pub(crate) fn estimated_gemm_ns(arch: &Arch, problem: &SparseLinearProblem) -> Result<i64> {
    let (kernel, _) = plan_sparse_linear(arch, problem)?;
    Ok(estimated_ns(arch, &kernel.tile, problem))
}

/// Output tiles of a problem.
fn tiles(tile: &Tile, problem: &SparseLinearProblem) -> i64 {
    ceil_div(problem.m, tile.bm) * ceil_div(problem.n, tile.bn)
}

/// Estimated time of the whole GEMM on an H200, to rank tiles by: that of the multiprocessor with the most tiles.
///
/// It takes as long as its tiles take one after the other, also where it runs several side by side: they share what it has. That holds
/// for a lone tile too, which waits less for the others but more for memory. What a tile costs besides depends little on the rank.
fn estimated_ns(arch: &Arch, tile: &Tile, problem: &SparseLinearProblem) -> i64 {
    let steps = ceil_div(problem.k, Tile::bk(problem.dtype));
    // Sizes that are valid one by one may be beyond all time together.
    ceil_div(tiles(tile, problem), arch.sms.max(1)).saturating_mul(steps * tile.step_ns(problem.dtype) + tile.tile_ns)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;
    use crate::prologue::Prologue;

    fn h200() -> Arch {
        Arch::from_capability((9, 0), 132)
    }

    fn ampere() -> Arch {
        Arch::from_capability((8, 0), 108)
    }

    fn linear(m: i64, n: i64, k: i64) -> SparseLinearProblem {
        SparseLinearProblem { dtype: Dtype::Bf16, m, n, k, rank: 64 }
    }

    fn e4m3(problem: SparseLinearProblem) -> SparseLinearProblem {
        SparseLinearProblem { dtype: Dtype::Bf16E4m3, ..problem }
    }

    fn sparsify(m: i64, rank: i64) -> SparsifyProblem {
        SparsifyProblem {
            dtype: Dtype::F16,
            m,
            k: 3072,
            ldx: 3072,
            prologue: Prologue::default(),
            gathered: false,
            rank,
            norm_compensation: true,
            branch_of_dropped: true,
            eps: 1e-8,
            values_scale: 1.0,
        }
    }

    fn name(capability: (u32, u32), problem: SparseLinearProblem) -> String {
        plan_sparse_linear(&Arch::from_capability(capability, 132), &problem).unwrap().0.to_string()
    }

    #[test]
    fn large_problems_take_large_tiles_and_small_ones_small_tiles() {
        let problems = [linear(4608, 12288, 3072), linear(4096, 3072, 3072), linear(64, 64, 3072), linear(128, 3072, 3072)];
        let names = |capability| problems.map(|problem| name(capability, problem));
        let (wgmma, lowest) = ("spmm_sm90_bf16_256x192x64_s5", "spmm_sm90_bf16_128x128x64_s8");
        let (large, fitting, small) = ("spmm_sm80_bf16_256x128x64_s4", "spmm_sm80_bf16_128x128x64_s4", "spmm_sm80_bf16_64x64x64_s4");
        assert_eq!(names((9, 0)), [wgmma, wgmma, lowest, lowest]);
        assert_eq!(names((8, 0)), [fitting, large, small, small]); // 6 waves of 128x128 take longer than 3 of 256x128
        assert_eq!(names((8, 9)), [fitting, fitting, small, small]);
    }

    /// The tiles that were fastest on an H200: 3 whole waves of 192x192 for 2.2 of 256x192, 4 of 192x160 for 3.1.
    #[test]
    fn tiles_are_those_that_leave_the_last_wave_least_empty() {
        let tile = |m, n, k| {
            let tile = plan_sparse_linear(&h200(), &linear(m, n, k)).unwrap().0.tile;
            (tile.bm, tile.bn)
        };
        assert_eq!([tile(4608, 12288, 3072), tile(8192, 8192, 12288)], [(256, 192); 2]);
        assert_eq!([tile(4608, 3072, 12288), tile(4608, 3072, 15360)], [(192, 192); 2]);
        assert_eq!([tile(4224, 3840, 3840), tile(4224, 3840, 10240)], [(192, 160); 2]);
        assert_eq!([tile(1024, 3072, 3072), tile(512, 3072, 12288)], [(128, 192), (128, 128)]);
    }

    #[test]
    fn hopper_tiles_run_on_hopper_only() {
        for capability in [(8, 0), (8, 6), (8, 9), (9, 1), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)] {
            for problem in [linear(1, 8, 64), linear(512, 3072, 3072), linear(8192, 8192, 12288)] {
                let name = name(capability, problem);
                assert!(name.starts_with("spmm_sm80"), "{capability:?}: {name}");
            }
        }
    }

    #[test]
    fn norms_run_everywhere() {
        let prologue = Prologue { activation: Activation::Norm, norm_rows: 32, ..Prologue::default() };
        let problem = SparsifyProblem { prologue, ..sparsify(64, 48) };
        for (arch, name) in [(h200(), "sparsify_sm90_f16_r64_norm"), (ampere(), "sparsify_f16_r64_norm")] {
            let (kernel, launch) = plan_sparsify(&arch, &problem).unwrap();
            assert_eq!(kernel.to_string(), name);
            assert_eq!(launch, plan_sparsify(&arch, &sparsify(64, 48)).unwrap().1);
        }
    }

    #[test]
    fn activations_run_on_hopper_only() {
        for activation in [Activation::GeluTanh, Activation::SiluGate] {
            let problem = SparsifyProblem { prologue: Prologue { activation, ld_gate: 3072, ..Prologue::default() }, ..sparsify(64, 48) };
            let (kernel, launch) = plan_sparsify(&h200(), &problem).unwrap();
            assert_eq!(kernel.to_string(), format!("sparsify_sm90_f16_r64{activation}"));
            assert_eq!(launch.blocks, plan_sparsify(&h200(), &sparsify(64, 48)).unwrap().1.blocks);
            for arch in [ampere(), h200().portable()] {
                let refused = Error::UnsupportedActivation { op: "sparsify", capability: arch.capability };
                assert_eq!(plan_sparsify(&arch, &problem), Err(refused));
            }
        }
    }

    #[test]
    fn channels_are_gathered_everywhere_by_kernels_of_their_own() {
        for (arch, name) in [(h200(), "sparsify_sm90_f16_r64_gathered"), (ampere(), "sparsify_f16_r64_gathered")] {
            let (kernel, launch) = plan_sparsify(&arch, &SparsifyProblem { gathered: true, ..sparsify(512, 64) }).unwrap();
            assert_eq!(kernel.to_string(), name);
            assert_eq!(launch, plan_sparsify(&arch, &sparsify(512, 64)).unwrap().1);
        }
    }

    #[test]
    fn e4m3_runs_on_hopper_only() {
        assert_eq!(name((9, 0), e4m3(linear(4608, 12288, 3072))), "spmm_sm90_bf16e4m3_256x192x128_s5");
        for arch in [ampere(), h200().portable(), Arch::from_capability((12, 0), 170)] {
            let refused = |op| Error::UnsupportedPrecision { op, capability: arch.capability };
            assert_eq!(candidates(&arch, &e4m3(linear(64, 64, 64))).unwrap().count(), 0);
            assert_eq!(plan_sparse_linear(&arch, &e4m3(linear(64, 64, 64))), Err(refused("sparse_linear")));
            let problem = SparsifyProblem { dtype: Dtype::F16E4m3, ..sparsify(64, 0) };
            assert_eq!(plan_sparsify(&arch, &problem), Err(refused("sparsify")));
        }
    }

    #[test]
    fn every_tile_of_the_gpu_is_a_candidate_and_the_plan_is_one() {
        for problem in [linear(1, 8, 64), linear(512, 3072, 3072), linear(8192, 8192, 12288)] {
            for (arch, expected) in [(h200(), &TILES[..]), (ampere(), &TILES[5..]), (h200().portable(), &TILES[5..])] {
                let found: Vec<_> = candidates(&arch, &problem).unwrap().collect();
                assert_eq!(found.iter().map(|(kernel, _)| kernel.tile).collect::<Vec<_>>(), expected);
                assert!(found.contains(&plan_sparse_linear(&arch, &problem).unwrap()));
            }
        }
    }

    #[test]
    fn tiles_too_small_to_be_numbered_are_no_candidates() {
        // 2^31 + 2^16 tiles of 64 x 64, half as many or fewer of the larger ones.
        let problem = linear((1 << 22) + 128, 1 << 21, 64);
        let tiles: Vec<_> = candidates(&ampere(), &problem).unwrap().map(|(kernel, _)| kernel.tile).collect();
        assert_eq!(tiles, TILES[5..8]);
    }

    #[test]
    fn a_portable_hopper_runs_what_ampere_runs() {
        let (kernel, launch) = plan_sparsify(&h200().portable(), &sparsify(4608, 64)).unwrap();
        assert_eq!((kernel.family, launch.cluster), (Family::Sm80, 1));
        let (kernel, _) = plan_sparse_linear(&h200().portable(), &linear(4608, 12288, 3072)).unwrap();
        assert_eq!(kernel.tile.family, Family::Sm80);
        assert_eq!(Arch::from_capability((7, 5), 40).portable().capability, (7, 5));
    }

    #[test]
    fn the_estimate_is_that_of_the_busiest_multiprocessor() {
        let ns = |tile: usize, problem| estimated_ns(&h200(), &TILES[tile], &problem);
        assert_eq!(ns(0, linear(256, 192, 3072)), 48 * 596 + 6050);
        assert_eq!(ns(0, linear(256, 192 * 132, 3072)), 48 * 596 + 6050);
        assert_eq!(ns(0, linear(256, 192 * 133, 3072)), 2 * (48 * 596 + 6050));
        assert_eq!(ns(0, e4m3(linear(256, 192, 3136))), 25 * 612 + 6050);
        assert_eq!(ns(8, linear(65, 64, 64)), 180 + 1100);
        assert_eq!(ns(5, linear((1 << 31) - 512, (1 << 31) - 512, (1 << 31) - 512)), i64::MAX);
    }

    #[test]
    fn the_grid_covers_every_output_element_once() {
        for (m, n) in [(1, 8), (63, 72), (129, 128), (4608, 12288), (1000, 3080)] {
            for arch in [h200(), ampere()] {
                let (kernel, launch) = plan_sparse_linear(&arch, &linear(m, n, 64)).unwrap();
                let Tile { bm, bn, persistent, .. } = kernel.tile;
                let tiles = ceil_div(m, bm) * ceil_div(n, bn);
                assert_eq!(i64::from(launch.blocks.0), if persistent { tiles.min(arch.sms) } else { tiles }, "{kernel}");
                assert_eq!(i64::from(launch.shared_bytes), kernel.tile.shared_bytes());
            }
        }
    }

    #[test]
    fn persistent_blocks_fill_the_gpu_once() {
        let blocks = |m, n| plan_sparse_linear(&h200(), &linear(m, n, 3072)).unwrap().1;
        assert_eq!(blocks(4608, 12288), Launch { blocks: (132, 1), cluster: 1, threads: 384, shared_bytes: 204880, overlaps: true });
        let smaller = blocks(1024, 3072);
        assert_eq!((smaller.blocks, smaller.overlaps), ((8 * 16, 1), false));
        assert!(plan_sparse_linear(&h200(), &e4m3(linear(1024, 3072, 3072))).unwrap().1.overlaps);
    }

    #[test]
    fn tiles_that_do_not_fit_shared_memory_are_never_chosen() {
        for (capability, shared_bytes) in [((8, 6), 64 * 1024), ((9, 0), 200 * 1024)] {
            let tight = Arch { shared_bytes, ..Arch::from_capability(capability, 84) };
            let (kernel, _) = plan_sparse_linear(&tight, &linear(4608, 12288, 3072)).unwrap();
            assert!(kernel.tile.shared_bytes() <= shared_bytes, "{kernel}");
        }
        let fitting = |capability| TILES.map(|tile| Arch::from_capability(capability, 100).runs(&tile));
        assert_eq!(fitting((8, 9)), [false, false, false, false, false, false, true, true, true]);
        assert_eq!(fitting((9, 0)), [true; 9]);
    }

    #[test]
    fn sparsify_takes_the_smallest_sufficient_capacity() {
        let name = |rank| plan_sparsify(&ampere(), &sparsify(10, rank)).unwrap().0.to_string();
        assert_eq!(
            [0, 16, 48, 64, 80, 128].map(name),
            ["sparsify_f16_r0", "sparsify_f16_r16", "sparsify_f16_r64", "sparsify_f16_r64", "sparsify_f16_r64", "sparsify_f16_r64"]
        );
    }

    #[test]
    fn sparsify_covers_the_padding_rows() {
        let rows = |arch, m| {
            let (kernel, launch) = plan_sparsify(arch, &sparsify(m, 0)).unwrap();
            i64::from(launch.blocks.0 / launch.cluster) * kernel.rows()
        };
        for arch in [&ampere(), &h200()] {
            assert_eq!([1, 64, 65, 4608].map(|m| rows(arch, m)), [64, 64, 128, 4608]);
        }
        assert_eq!(plan_sparsify(&ampere(), &sparsify(65, 0)).unwrap().1.blocks, (8, 1));
    }

    #[test]
    fn ranks_above_the_largest_capacity_are_split_over_blocks() {
        for (arch, x) in [(ampere(), 4), (h200(), 6)] {
            let blocks = |rank| plan_sparsify(&arch, &sparsify(64, rank)).unwrap().1.blocks;
            assert_eq!([0, 16, 48, 64, 80, 128].map(blocks), [(x, 1), (x, 1), (x, 1), (x, 1), (x, 2), (x, 2)]);
        }
    }

    #[test]
    fn sparsify_in_clusters_runs_on_hopper_only() {
        for capability in [(8, 0), (8, 6), (8, 9), (9, 0), (9, 1), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)] {
            let (kernel, launch) = plan_sparsify(&Arch::from_capability(capability, 132), &sparsify(512, 64)).unwrap();
            let expected = if capability == (9, 0) { ("sparsify_sm90_f16_r64", 6) } else { ("sparsify_f16_r64", 1) };
            assert_eq!((kernel.to_string().as_str(), launch.cluster), expected, "{capability:?}");
        }
    }

    /// The sizes that were fastest when measured on an H200, or within 5 % of it.
    #[test]
    fn clusters_are_as_large_as_is_fastest() {
        let launch = |m, k| plan_sparsify(&h200(), &SparsifyProblem { k, ldx: k, ..sparsify(m, 64) }).unwrap().1;
        let cluster = |(m, k)| launch(m, k).cluster;
        assert_eq!([(4096, 3072), (4608, 3072), (4608, 12288), (4224, 3840), (8192, 12288)].map(cluster), [2, 3, 3, 2, 2]);
        assert_eq!([(512, 3072), (512, 12288), (2048, 3072)].map(cluster), [6, 8, 3]);
        assert_eq!(launch(4608, 3072), Launch { blocks: (216, 1), cluster: 3, threads: 288, shared_bytes: 98304, overlaps: false });
    }

    #[test]
    fn every_block_of_a_cluster_has_columns() {
        let cluster = |k| plan_sparsify(&h200(), &SparsifyProblem { k, ldx: k, ..sparsify(1, 64) }).unwrap().1.cluster;
        assert_eq!([64, 256, 320, 768, 832, 3072].map(cluster), [1, 1, 2, 3, 4, 6]);
    }

    #[test]
    fn whole_clusters_are_launched() {
        for sms in [1, 16, 78, 114, 132] {
            for m in [1, 63, 64, 65, 512, 1000, 4608, 20000, 1 << 30] {
                let (_, launch) = plan_sparsify(&Arch::from_capability((9, 0), sms), &sparsify(m, 128)).unwrap();
                assert!((1..=8).contains(&launch.cluster) && launch.blocks.0 % launch.cluster == 0, "{sms} {m}: {launch:?}");
            }
        }
    }

    #[test]
    fn older_gpus_and_bad_problems_are_refused() {
        let turing = Arch::from_capability((7, 5), 40);
        assert_eq!(
            plan_sparse_linear(&turing, &linear(64, 64, 64)),
            Err(Error::UnsupportedArch { op: "sparse_linear", capability: (7, 5) })
        );
        assert_eq!(plan_sparsify(&turing, &sparsify(64, 0)), Err(Error::UnsupportedArch { op: "sparsify", capability: (7, 5) }));
        assert!(matches!(plan_sparse_linear(&h200(), &linear(64, 65, 64)), Err(Error::InvalidArgument { argument: "n", .. })));
        let too_many = linear(1 << 30, 1 << 30, 64);
        assert!(matches!(plan_sparse_linear(&h200(), &too_many), Err(Error::InvalidArgument { argument: "m", .. })));
    }
}
