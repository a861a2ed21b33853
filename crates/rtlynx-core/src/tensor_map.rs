//! Tensor maps: what the copy engine of Hopper must be told of a matrix before it copies boxes of it to shared memory.
//!
//! They hold the address of the data, so every call encodes its own: weights move when a model is offloaded.

use std::ffi::c_void;
use std::ptr;

use cudarc::driver::sys::{
    CUtensorMap, CUtensorMapDataType as DataType, CUtensorMapFloatOOBfill as OutOfBounds, CUtensorMapInterleave as Interleave,
    CUtensorMapL2promotion as L2Promotion, CUtensorMapSwizzle, cuTensorMapEncodeTiled,
};

use crate::config::Tile;
use crate::device::check;
use crate::error::Result;
use crate::params::Address;
use crate::problem::{Dtype, SparseLinearProblem, SparseLinearTensors};

/// Columns of the branch in one pipeline stage.
const RANK_STEP: i64 = 32;
/// Both element types have two bytes.
const ELEMENT_BYTES: u64 = 2;

/// A map that is not read.
pub const UNUSED: CUtensorMap = CUtensorMap { opaque: [0; 16] };

/// How the rows of a box are spread over the banks of shared memory; the name is the length of such a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swizzle {
    /// Rows of 64 bytes.
    Bytes64,
    /// Rows of 128 bytes.
    Bytes128,
}

/// A row-major matrix without gaps, and the boxes in which it is copied. What a box covers outside the matrix arrives as zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorMap {
    /// Element type.
    pub dtype: Dtype,
    /// Of the first element, aligned to 16 bytes.
    pub address: Address,
    /// Columns and rows of the matrix. A row is a multiple of 16 bytes.
    pub size: [u64; 2],
    /// Columns and rows of a box, at most 256 each. A row of it is as long as `swizzle` says.
    pub box_size: [u32; 2],
    /// Where a box's 16-byte chunks go.
    pub swizzle: Swizzle,
}

impl TensorMap {
    /// Bytes from one row of the matrix to the next.
    pub const fn row_bytes(&self) -> u64 {
        self.size[0] * ELEMENT_BYTES
    }

    /// The 128 bytes that the copy engine reads. Needs a driver with CUDA 12 or newer, but no context.
    pub fn encode(&self) -> Result<CUtensorMap> {
        let dtype = match self.dtype {
            Dtype::Bf16 => DataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            Dtype::F16 => DataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        };
        let swizzle = match self.swizzle {
            Swizzle::Bytes64 => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            Swizzle::Bytes128 => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        };
        let address = ptr::without_provenance_mut::<c_void>(self.address as usize);
        let (row_bytes, element_strides) = ([self.row_bytes()], [1; 2]);
        let mut map = UNUSED;
        // SAFETY: the map and the arrays are valid and as long as two dimensions need: sizes, boxes and element strides of both, the
        // stride of the outer one. The driver checks the values and only writes the address down.
        let status = unsafe {
            cuTensorMapEncodeTiled(
                &raw mut map,
                dtype,
                2,
                address,
                self.size.as_ptr(),
                row_bytes.as_ptr(),
                self.box_size.as_ptr(),
                element_strides.as_ptr(),
                Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                L2Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                OutOfBounds::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        check("cuTensorMapEncodeTiled", status).map(|()| map)
    }
}

/// What the `spmm_sm90_*` kernels copy, in boxes of one pipeline stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpmmMaps {
    /// `[m, k / 2]`
    pub values: TensorMap,
    /// `[n, k]`
    pub weight: TensorMap,
    /// `[m, rank]`; none when rank is 0
    pub branch: Option<TensorMap>,
    /// `[n, rank]`; none when rank is 0
    pub comp_up: Option<TensorMap>,
}

impl SpmmMaps {
    /// Problem and tensors must be valid.
    pub fn new(tile: &Tile, problem: &SparseLinearProblem, tensors: &SparseLinearTensors) -> Self {
        let SparseLinearProblem { dtype, m, n, k, rank } = *problem;
        let map = |address, rows: i64, columns: i64, box_rows: i64, box_columns: i64, swizzle| TensorMap {
            dtype,
            address,
            size: [columns as u64, rows as u64],
            box_size: [box_columns as u32, box_rows as u32],
            swizzle,
        };
        Self {
            values: map(tensors.values, m, k / 2, tile.bm, Tile::BK / 2, Swizzle::Bytes64),
            weight: map(tensors.weight, n, k, tile.bn, Tile::BK, Swizzle::Bytes128),
            branch: (rank > 0).then(|| map(tensors.branch, m, rank, tile.bm, RANK_STEP, Swizzle::Bytes64)),
            comp_up: (rank > 0).then(|| map(tensors.comp_up, n, rank, tile.bn, RANK_STEP, Swizzle::Bytes64)),
        }
    }

    /// Every map, as the kernel's parameters order them.
    pub fn all(&self) -> [Option<TensorMap>; 4] {
        [Some(self.values), Some(self.weight), self.branch, self.comp_up]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Family, TILES};

    const PROBLEM: SparseLinearProblem = SparseLinearProblem { dtype: Dtype::Bf16, m: 1000, n: 3080, k: 2432, rank: 48 };
    const TENSORS: SparseLinearTensors =
        SparseLinearTensors { values: 16, metadata: 32, weight: 48, row_scale: 64, branch: 80, comp_up: 96, bias: 112, out: 128 };

    fn tiles() -> impl Iterator<Item = Tile> {
        TILES.into_iter().filter(|tile| tile.family == Family::Sm90)
    }

    #[test]
    fn maps_are_the_operands_in_boxes_of_a_stage() {
        let maps = SpmmMaps::new(&tiles().next().unwrap(), &PROBLEM, &TENSORS);
        let map = |address, size, box_size, swizzle| TensorMap { dtype: Dtype::Bf16, address, size, box_size, swizzle };
        assert_eq!(maps.values, map(16, [1216, 1000], [32, 256], Swizzle::Bytes64));
        assert_eq!(maps.weight, map(48, [2432, 3080], [64, 192], Swizzle::Bytes128));
        assert_eq!(maps.branch, Some(map(80, [48, 1000], [32, 256], Swizzle::Bytes64)));
        assert_eq!(maps.comp_up, Some(map(96, [48, 3080], [32, 192], Swizzle::Bytes64)));
        assert_eq!(maps.all().map(|map| map.unwrap().row_bytes()), [2432, 4864, 96, 96]);
    }

    #[test]
    fn without_a_branch_there_is_nothing_to_map_of_it() {
        for tile in tiles() {
            let maps = SpmmMaps::new(&tile, &SparseLinearProblem { rank: 0, ..PROBLEM }, &TENSORS);
            assert_eq!((maps.branch, maps.comp_up), (None, None));
        }
    }

    #[test]
    fn boxes_are_what_a_stage_holds_and_the_driver_accepts() {
        for tile in tiles() {
            let maps = SpmmMaps::new(&tile, &PROBLEM, &TENSORS);
            let bytes = |map: TensorMap| i64::from(map.box_size[0]) * i64::from(map.box_size[1]) * ELEMENT_BYTES as i64;
            assert_eq!(bytes(maps.values) + bytes(maps.weight), tile.stage_bytes());
            for map in maps.all().into_iter().flatten() {
                let row = if map.swizzle == Swizzle::Bytes64 { 64 } else { 128 };
                assert_eq!(u64::from(map.box_size[0]) * ELEMENT_BYTES, row, "{map:?}");
                assert!(map.box_size.iter().all(|&side| side <= 256) && map.row_bytes() % 16 == 0, "{map:?}");
            }
        }
    }
}
