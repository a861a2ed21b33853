//! Tensor maps: what the copy engine of Hopper must be told of a matrix before it copies boxes of it to shared memory.
//!
//! They hold the address of the data, so every call encodes its own: weights move when a model is offloaded.

use std::ffi::c_void;
use std::ptr;

use cudarc::driver::sys::{
    CUtensorMap, CUtensorMapDataType as DataType, CUtensorMapFloatOOBfill as OutOfBounds, CUtensorMapInterleave as Interleave,
    CUtensorMapL2promotion as L2Promotion, CUtensorMapSwizzle, cuTensorMapEncodeTiled,
};

use crate::config::{SparsifyKernel, Tile};
use crate::device::check;
use crate::dtype::Dtype;
use crate::error::Result;
use crate::format::PIECE_COLS;
use crate::params::Address;
use crate::problem::{SparseLinearProblem, SparseLinearTensors, SparsifyProblem, SparsifyTensors};
use crate::prologue::Prologue;

/// Columns of the branch in one pipeline stage.
const RANK_STEP: i64 = 32;
/// Dimensions that the copy engine knows.
const MAX_DIMENSIONS: usize = 5;

/// A map that is not read.
pub const UNUSED: CUtensorMap = CUtensorMap { opaque: [0; 16] };

/// What a tensor consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// bfloat16
    Bf16,
    /// IEEE half precision
    F16,
    /// Any type of one byte.
    Byte,
}

impl Element {
    /// Of what surrounds the sparse product.
    const fn of(dtype: Dtype) -> Self {
        match dtype {
            Dtype::Bf16 | Dtype::Bf16E4m3 => Self::Bf16,
            Dtype::F16 | Dtype::F16E4m3 => Self::F16,
        }
    }

    /// Of the sparse product's operands.
    const fn of_operands(dtype: Dtype) -> Self {
        if dtype.has_e4m3_operands() { Self::Byte } else { Self::of(dtype) }
    }

    const fn bytes(self) -> i64 {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::Byte => 1,
        }
    }
}

/// How the rows of a box are spread over the banks of shared memory; the name is the length of such a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Swizzle {
    /// Rows of 32 bytes.
    Bytes32,
    /// Rows of 64 bytes.
    Bytes64,
    /// Rows of 128 bytes.
    Bytes128,
}

impl Swizzle {
    /// The one for rows of so many bytes.
    const fn of_row(bytes: i64) -> Self {
        match bytes {
            32 => Self::Bytes32,
            64 => Self::Bytes64,
            128 => Self::Bytes128,
            _ => panic!("no swizzle has rows of this length"),
        }
    }
}

/// One dimension of a tensor in memory, and how much of it a box takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dimension {
    /// Elements.
    pub size: i64,
    /// Elements from one to the next in memory; of the first dimension 1, of the others a multiple of 16 bytes.
    pub stride: i64,
    /// Elements in a box, at most 256.
    pub box_size: i64,
}

impl Dimension {
    const fn new(size: i64, stride: i64, box_size: i64) -> Self {
        Self { size, stride, box_size }
    }
}

/// A tensor, and the boxes in which it is copied: what a box covers outside the tensor arrives as zeros. The strides may be in any order, so that a
/// box may reach shared memory in another order than it has in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorMap {
    /// What it consists of.
    pub element: Element,
    /// Of the first element, aligned to 16 bytes.
    pub address: Address,
    /// The first is the innermost one: a row of the box, as long as `swizzle` says. Unused dimensions at the end are `None`.
    pub dimensions: [Option<Dimension>; MAX_DIMENSIONS],
    /// Where a box's 16-byte chunks go.
    pub swizzle: Swizzle,
}

impl TensorMap {
    /// Rows of `columns` elements, `stride` elements apart.
    fn matrix(element: Element, address: Address, columns: Dimension, rows: Dimension) -> Self {
        let swizzle = Swizzle::of_row(columns.box_size * element.bytes());
        Self { element, address, dimensions: [Some(columns), Some(rows), None, None, None], swizzle }
    }

    fn used(&self) -> impl Iterator<Item = Dimension> {
        self.dimensions.into_iter().flatten()
    }

    /// Elements of a box.
    pub fn box_elements(&self) -> i64 {
        self.used().map(|dimension| dimension.box_size).product()
    }

    /// The 128 bytes that the copy engine reads. Needs a driver with CUDA 12 or newer, but no context.
    pub fn encode(&self) -> Result<CUtensorMap> {
        let dtype = match self.element {
            Element::Bf16 => DataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            Element::F16 => DataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            Element::Byte => DataType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
        };
        let swizzle = match self.swizzle {
            Swizzle::Bytes32 => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_32B,
            Swizzle::Bytes64 => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            Swizzle::Bytes128 => CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        };
        let address = ptr::without_provenance_mut::<c_void>(self.address as usize);
        let all = |of: fn(Dimension) -> u64| self.dimensions.map(|dimension| dimension.map_or(0, of));
        let sizes = all(|dimension| dimension.size as u64);
        let [_, strides @ ..] = all(|dimension| dimension.stride as u64).map(|stride| stride * self.element.bytes() as u64);
        let boxes = all(|dimension| dimension.box_size as u64).map(|elements| elements as u32);
        let mut map = UNUSED;
        // SAFETY: the map and the arrays are valid and as long as the most dimensions there are need: sizes, boxes and element strides of all, the
        // strides of all but the innermost. The driver checks the values and only writes the address down.
        let status = unsafe {
            cuTensorMapEncodeTiled(
                &raw mut map,
                dtype,
                self.used().count() as u32,
                address,
                sizes.as_ptr(),
                strides.as_ptr(),
                boxes.as_ptr(),
                [1; MAX_DIMENSIONS].as_ptr(),
                Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle,
                L2Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                OutOfBounds::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        check("cuTensorMapEncodeTiled", status).map(|()| map)
    }
}

/// What the `sparsify_sm90_*` kernels copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SparsifyMaps {
    /// `[m, k - head_k]`
    pub x: TensorMap,
    /// `[m, head_k]`; none when `head_k` is 0
    pub head: Option<TensorMap>,
    /// `[m, k - head_k]`; none without a gate
    pub gate: Option<TensorMap>,
    /// `[k, rank]`; none when rank is 0
    pub comp_down: Option<TensorMap>,
}

impl SparsifyMaps {
    /// Problem and tensors must be valid.
    pub fn new(kernel: &SparsifyKernel, problem: &SparsifyProblem, tensors: &SparsifyTensors) -> Self {
        const UNIT: i64 = SparsifyKernel::UNIT_COLS;
        let element = Element::of(problem.dtype);
        let SparsifyProblem { m, k, ldx, rank, prologue: Prologue { activation, head_k, ld_head, ld_gate, .. }, .. } = *problem;
        let box_columns = if kernel.gathered { PIECE_COLS } else { UNIT };
        let rows = |address, columns, stride| {
            TensorMap::matrix(element, address, Dimension::new(columns, 1, box_columns), Dimension::new(m, stride, kernel.rows()))
        };
        // The 64 channels of a unit arrive in the order in which the lanes hold them (the kernel's header draws it): for each of the 4 groups of a
        // lane and each pair of channels in it, of the 4 lanes that pair.
        let channels = [
            Dimension::new(rank, 1, kernel.capacity),
            Dimension::new(2, rank, 2),
            Dimension::new(4, 16 * rank, 4),
            Dimension::new(8, 2 * rank, 8),
            Dimension::new(k / UNIT, UNIT * rank, 1),
        ];
        Self {
            x: rows(tensors.x, problem.x_columns(), ldx),
            head: (head_k > 0).then(|| rows(tensors.head, head_k, ld_head)),
            gate: activation.has_gate().then(|| rows(tensors.gate, problem.x_columns(), ld_gate)),
            comp_down: (rank > 0).then(|| TensorMap {
                element,
                address: tensors.comp_down,
                dimensions: channels.map(Some),
                swizzle: Swizzle::of_row(kernel.capacity * element.bytes()),
            }),
        }
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
        let (operand, element, bk) = (Element::of_operands(dtype), Element::of(dtype), Tile::bk(dtype));
        let map = |element, address, rows: i64, columns: i64, box_rows: i64, box_columns: i64| {
            TensorMap::matrix(element, address, Dimension::new(columns, 1, box_columns), Dimension::new(rows, columns, box_rows))
        };
        Self {
            values: map(operand, tensors.values, m, k / 2, tile.bm, bk / 2),
            weight: map(operand, tensors.weight, n, k, tile.bn, bk),
            branch: (rank > 0).then(|| map(element, tensors.branch, m, rank, tile.bm, RANK_STEP)),
            comp_up: (rank > 0).then(|| map(element, tensors.comp_up, n, rank, tile.bn, RANK_STEP)),
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
    use crate::prologue::Activation;

    const PROBLEM: SparseLinearProblem = SparseLinearProblem { dtype: Dtype::Bf16, m: 1000, n: 3080, k: 2432, rank: 48 };
    const TENSORS: SparseLinearTensors = SparseLinearTensors {
        values: 16,
        metadata: 32,
        weight: 48,
        weight_scale: 0,
        row_scale: 64,
        branch: 80,
        comp_up: 96,
        bias: 112,
        out: 128,
    };

    fn tiles() -> impl Iterator<Item = Tile> {
        TILES.into_iter().filter(|tile| tile.family == Family::Sm90)
    }

    fn sparsify_maps(rank: i64, capacity: i64) -> SparsifyMaps {
        maps_after(Prologue::default(), false, rank, capacity)
    }

    fn maps_after(prologue: Prologue, gathered: bool, rank: i64, capacity: i64) -> SparsifyMaps {
        let kernel = SparsifyKernel { family: Family::Sm90, dtype: Dtype::F16, capacity, activation: prologue.activation, gathered };
        let problem = SparsifyProblem {
            dtype: Dtype::F16,
            m: 1000,
            k: 320,
            ldx: 328,
            prologue,
            gathered,
            rank,
            norm_compensation: true,
            branch_of_dropped: true,
            eps: 0.0,
            values_scale: 1.0,
        };
        SparsifyMaps::new(&kernel, &problem, &SparsifyTensors { x: 16, gate: 48, head: 64, comp_down: 32, ..SparsifyTensors::default() })
    }

    #[test]
    fn maps_are_the_operands_in_boxes_of_a_stage() {
        let maps = SpmmMaps::new(&tiles().next().unwrap(), &PROBLEM, &TENSORS);
        let map = |address, columns, rows| TensorMap::matrix(Element::Bf16, address, columns, rows);
        assert_eq!(maps.values, map(16, Dimension::new(1216, 1, 32), Dimension::new(1000, 1216, 256)));
        assert_eq!(maps.weight, map(48, Dimension::new(2432, 1, 64), Dimension::new(3080, 2432, 192)));
        assert_eq!(maps.branch, Some(map(80, Dimension::new(48, 1, 32), Dimension::new(1000, 48, 256))));
        assert_eq!(maps.comp_up, Some(map(96, Dimension::new(48, 1, 32), Dimension::new(3080, 48, 192))));
        assert_eq!(maps.all().map(|map| map.unwrap().swizzle), [Swizzle::Bytes64, Swizzle::Bytes128, Swizzle::Bytes64, Swizzle::Bytes64]);
    }

    #[test]
    fn only_the_operands_are_bytes_with_e4m3() {
        let maps = SpmmMaps::new(&tiles().next().unwrap(), &SparseLinearProblem { dtype: Dtype::F16E4m3, ..PROBLEM }, &TENSORS);
        let map = |address, columns, rows| TensorMap::matrix(Element::Byte, address, columns, rows);
        assert_eq!(maps.values, map(16, Dimension::new(1216, 1, 64), Dimension::new(1000, 1216, 256)));
        assert_eq!(maps.weight, map(48, Dimension::new(2432, 1, 128), Dimension::new(3080, 2432, 192)));
        assert_eq!(maps.all().map(|map| map.unwrap().element), [Element::Byte, Element::Byte, Element::F16, Element::F16]);
        assert_eq!(maps.all().map(|map| map.unwrap().swizzle), [Swizzle::Bytes64, Swizzle::Bytes128, Swizzle::Bytes64, Swizzle::Bytes64]);
    }

    #[test]
    fn without_a_branch_there_is_nothing_to_map_of_it() {
        for tile in tiles() {
            let maps = SpmmMaps::new(&tile, &SparseLinearProblem { rank: 0, ..PROBLEM }, &TENSORS);
            assert_eq!((maps.branch, maps.comp_up), (None, None));
        }
        assert_eq!(sparsify_maps(0, 0).comp_down, None);
    }

    #[test]
    fn rows_of_x_may_have_gaps() {
        let expected = TensorMap::matrix(Element::F16, 16, Dimension::new(320, 1, 64), Dimension::new(1000, 328, 64));
        assert_eq!(sparsify_maps(0, 0).x, expected);
    }

    #[test]
    fn the_head_has_the_first_columns_and_x_and_the_gate_the_others() {
        for (gathered, box_columns) in [(false, 64), (true, 16)] {
            let prologue = Prologue { activation: Activation::SiluGate, head_k: 128, ld_head: 136, ld_gate: 200, ..Prologue::default() };
            let maps = maps_after(prologue, gathered, 0, 0);
            let map = |address, columns, stride| {
                TensorMap::matrix(Element::F16, address, Dimension::new(columns, 1, box_columns), Dimension::new(1000, stride, 64))
            };
            assert_eq!((maps.x, maps.gate, maps.head), (map(16, 192, 328), Some(map(48, 192, 200)), Some(map(64, 128, 136))));
            let plain = maps_after(Prologue { activation: Activation::GeluTanh, ..Prologue::default() }, gathered, 0, 0);
            assert_eq!((plain.x, plain.gate, plain.head), (map(16, 320, 328), None, None));
        }
    }

    /// Walks a box as the copy engine does and asks which channel of the unit stands in each row of shared memory.
    #[test]
    fn channels_of_comp_down_arrive_in_the_order_of_the_lanes() {
        let [_, inner @ ..] = sparsify_maps(48, 64).comp_down.unwrap().dimensions.map(Option::unwrap);
        for row in 0..64 {
            let (mut left, mut channel) = (row, 0);
            for dimension in inner {
                channel += left % dimension.box_size * dimension.stride / 48;
                left /= dimension.box_size;
            }
            let (c, h, q, e) = (row / 16, row / 8 % 2, row / 2 % 4, row % 2);
            assert_eq!(channel, 16 * q + 4 * c + 2 * h + e, "row {row}");
        }
    }

    #[test]
    fn boxes_are_what_the_kernels_hold_and_the_driver_accepts() {
        let mut maps: Vec<TensorMap> = Vec::new();
        for (tile, dtype) in tiles().flat_map(|tile| Dtype::ALL.map(|dtype| (tile, dtype))) {
            let spmm = SpmmMaps::new(&tile, &SparseLinearProblem { dtype, ..PROBLEM }, &TENSORS);
            let elements = spmm.values.box_elements() + spmm.weight.box_elements();
            assert_eq!(elements * dtype.operand_bytes(), tile.stage_bytes());
            maps.extend(spmm.all().into_iter().flatten());
        }
        for (rank, capacity) in [(16, 16), (32, 32), (48, 64), (128, 64)] {
            let sparsify = sparsify_maps(rank, capacity);
            assert_eq!(sparsify.comp_down.unwrap().box_elements(), 64 * capacity);
            maps.extend([Some(sparsify.x), sparsify.comp_down].into_iter().flatten());
            maps.push(maps_after(Prologue::default(), true, rank, capacity).x);
        }
        for map in maps {
            let [row, outer @ ..] = map.dimensions;
            let row_bytes = match map.swizzle {
                Swizzle::Bytes32 => 32,
                Swizzle::Bytes64 => 64,
                Swizzle::Bytes128 => 128,
            };
            let bytes = map.element.bytes();
            assert_eq!((row.unwrap().stride, row.unwrap().box_size * bytes), (1, row_bytes), "{map:?}");
            assert!(outer.into_iter().flatten().all(|d| d.stride * bytes % 16 == 0 && d.box_size <= 256), "{map:?}");
        }
    }
}
