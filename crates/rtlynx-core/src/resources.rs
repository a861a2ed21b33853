//! What the tables of kernels say of a launch, threads and shared memory, is what the CUDA sources lay out.

use crate::config::{FUSED_TILES, Family, FusedTile, NormRotaryKernel, ProbeKernel, RowStatsKernel, SparsifyKernel, TILES, Tile};
use crate::dtype::Dtype;
use crate::header::{calls, constants};
use crate::prologue::Activation;

macro_rules! source {
    ($path:literal) => {
        include_str!(concat!("../../../cuda/", $path))
    };
}

const FORMAT: &str = source!("include/rtlynx/format.cuh");
const TILE_SM80: &str = source!("include/rtlynx/tile_sm80.cuh");

/// The constants of sources that include each other, in that order.
struct Constants(Vec<(String, i64)>);

impl Constants {
    fn of<const SOURCES: usize>(sources: [&str; SOURCES], given: &[(&str, i64)]) -> Self {
        Self(constants(&sources.join("\n"), given).into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
    }

    fn get(&self, name: &str) -> i64 {
        self.0.iter().find(|(known, _)| known == name).unwrap_or_else(|| panic!("no constant `{name}` that can be computed")).1
    }
}

#[test]
fn sparsify() {
    let all = |capacity| Constants::of([FORMAT, source!("kernels/sparsify.cu")], &[("kRankCapacity", capacity)]);
    for kernel in SparsifyKernel::all().filter(|kernel| kernel.family == Family::Sm80) {
        let c = all(kernel.capacity);
        assert_eq!(i64::from(kernel.threads()), c.get("kThreads"), "{kernel}");
        assert_eq!(kernel.rows(), c.get("kTileRows"), "{kernel}");
        // `partial`: of every warp the sums, or before them what it exchanges.
        let exchanged = if kernel.gathered { c.get("kExchangeBytes") } else { 0 };
        let bytes = c.get("kWarps") * exchanged.max(c.get("kTileRows") * kernel.capacity * 4);
        assert_eq!(i64::from(kernel.shared_bytes()), bytes, "{kernel}");
    }
}

#[test]
fn sparsify_sm90() {
    for kernel in SparsifyKernel::all().filter(|kernel| kernel.family == Family::Sm90) {
        let gated = i64::from(kernel.activation == Activation::SiluGate);
        let given = [("kRankCapacity", kernel.capacity), ("kGated", gated)];
        let c = Constants::of([FORMAT, source!("include/rtlynx/sparsify_sm90.cuh")], &given);
        assert_eq!(i64::from(kernel.threads()), c.get("kThreads"), "{kernel}");
        assert_eq!(kernel.rows(), c.get("kRows"), "{kernel}");
        assert_eq!(i64::from(kernel.shared_bytes()), c.get("kCount") * c.get("kStageBytes"), "{kernel}");
        assert_eq!(SparsifyKernel::MAX_CLUSTER, c.get("kMaxCluster"));
        assert_eq!(SparsifyKernel::UNIT_COLS, c.get("kWordCols"));
    }
}

#[test]
fn spmm_sm80() {
    let source = source!("kernels/spmm_sm80.cu");
    let tiles: Vec<Tile> = TILES.into_iter().filter(|tile| tile.family == Family::Sm80).collect();
    let compiled = calls(source, "RTLYNX_SPMM_TYPES");
    assert_eq!(tiles.len(), compiled.len());
    for (tile, compiled) in tiles.iter().zip(compiled) {
        let [bm, bn, warps_m, warps_n, stages, _blocks] = compiled[..] else { panic!("{compiled:?}") };
        let given = [("kBM_", bm), ("kBN_", bn), ("kWarpsM", warps_m), ("kWarpsN_", warps_n), ("kStages_", stages)];
        let c = Constants::of([FORMAT, TILE_SM80, source], &given);
        assert_eq!((tile.bm, tile.bn, i64::from(tile.stages)), (c.get("kBM"), c.get("kBN"), c.get("kStages")));
        assert_eq!(i64::from(tile.threads), c.get("kThreads"), "{tile:?}");
        assert_eq!(tile.shared_bytes(), c.get("kStages") * c.get("kStageBytes"), "{tile:?}");
        assert_eq!(Tile::bk(Dtype::Bf16), c.get("kBK"));
    }
}

#[test]
fn spmm_sm90() {
    let tiles: Vec<Tile> = TILES.into_iter().filter(|tile| tile.family == Family::Sm90).collect();
    let compiled = calls(source!("kernels/spmm_sm90.cu"), "RTLYNX_SPMM_TYPES");
    assert_eq!(compiled, calls(source!("kernels/spmm_epilogue_sm90.cu"), "RTLYNX_SPMM_EPILOGUE_TYPES"));
    assert_eq!(tiles.len(), compiled.len());
    for (tile, compiled) in tiles.iter().zip(compiled) {
        let [bm, bn, consumers, stages] = compiled[..] else { panic!("{compiled:?}") };
        let given = [("kBM_", bm), ("kBN_", bn), ("kConsumers_", consumers), ("kStages_", stages)];
        let c = Constants::of([FORMAT, source!("include/rtlynx/spmm_tiles_sm90.cuh")], &given);
        assert_eq!((tile.bm, tile.bn, i64::from(tile.stages)), (c.get("kBM"), c.get("kBN"), c.get("kStages")));
        assert_eq!(i64::from(tile.threads), c.get("kThreads"), "{tile:?}");
        assert_eq!(c.get("kTilesM") * 64 * c.get("kConsumers"), tile.bm);
        // `Shared`: the stages, then of each a full and an empty barrier of 8 bytes.
        assert_eq!(tile.shared_bytes(), c.get("kStages") * (c.get("kStageBytes") + 2 * 8), "{tile:?}");
        assert_eq!([1, 2].map(|bytes| c.get("kRowBytes") / bytes), [Dtype::Bf16E4m3, Dtype::Bf16].map(Tile::bk));
    }
}

#[test]
fn fused_sm80() {
    let source = source!("kernels/fused_sm80.cu");
    let compiled = calls(source, "RTLYNX_FUSED_TYPES");
    assert_eq!(FUSED_TILES.len(), compiled.len());
    for (tile, compiled) in FUSED_TILES.iter().zip(compiled) {
        let [bm, bn, stages] = compiled[..] else { panic!("{compiled:?}") };
        let c = Constants::of([FORMAT, TILE_SM80, source], &[("kBM_", bm), ("kBN_", bn), ("kStages_", stages)]);
        assert_eq!((tile.bm, tile.bn, i64::from(tile.stages)), (bm, bn, stages));
        assert_eq!(i64::from(FusedTile::THREADS), c.get("kThreads"), "{tile}");
        assert_eq!(tile.shared_bytes(), c.get("kStages") * c.get("kStageBytes"), "{tile}");
        assert_eq!(FusedTile::BK, c.get("kBK"));
    }
}

#[test]
fn row_stats() {
    let c = Constants::of([FORMAT, source!("kernels/row_stats.cu")], &[]);
    assert_eq!(RowStatsKernel::WARPS, c.get("kWarps"));
}

#[test]
fn norm_rotary() {
    let source = source!("kernels/norm_rotary.cu");
    let c = Constants::of([FORMAT, source], &[]);
    assert_eq!(NormRotaryKernel::THREADS, c.get("kThreads"));
    assert_eq!(NormRotaryKernel::HEADS, c.get("kHeads"));
    for kernel in NormRotaryKernel::all() {
        let lanes = NormRotaryKernel::THREADS / kernel.rows();
        assert_eq!(kernel.dim, lanes * c.get("kVector"));
        assert!(source.lines().any(|line| line.contains(&format!("({kernel}, ")) && line.ends_with(&format!(", {lanes})"))), "{kernel}");
    }
}

#[test]
fn probe_sm90() {
    for kernel in ProbeKernel::all() {
        let c = Constants::of([FORMAT, source!("kernels/probe_sm90.cu")], &[("kSparse", kernel.sparse.into())]);
        assert_eq!(i64::from(ProbeKernel::THREADS), c.get("kThreads"));
        assert_eq!(i64::from(kernel.shared_bytes()), c.get("kBytes") + c.get("kWBytes"), "{kernel}");
    }
}
