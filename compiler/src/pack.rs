//! The weights of a plan: in which format each tensor stands on the device, how it is cut to fit a binding, and from which
//! bytes of which files it is made.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use moewe_plan::{SCALE_GROUP, Segment, Shard, Weight, WeightFile, WeightFormat};

use crate::checkpoint::Checkpoint;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::graph::WeightRef;
use crate::select::{Scales, Stored};
use crate::tensors::{self, Part, Role};

/// A tensor of the checkpoint, or some of its columns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) tensor: String,
    pub(crate) columns: Option<Range<usize>>,
}

impl Piece {
    fn whole(tensor: String) -> Self {
        Self { tensor, columns: None }
    }

    /// Name under which it is written.
    pub(crate) fn name(&self) -> String {
        match &self.columns {
            None => self.tensor.clone(),
            Some(columns) => format!("{}.columns-{}-{}", self.tensor, columns.start, columns.end),
        }
    }
}

/// What a weight is made of.
#[derive(Clone, Debug)]
pub(crate) enum Content {
    /// Tensors of the checkpoint, one after the other.
    Tensors(Vec<Piece>),
    /// The scales that the compiler chooses for the groups of these tensors in this format, one after the other.
    Scales(Vec<Piece>, WeightFormat),
    /// Numbers that the compiler made.
    Generated(Vec<f32>),
}

/// A weight of the plan before its bytes are placed.
#[derive(Clone, Debug)]
pub(crate) struct Item {
    pub(crate) weight: Weight,
    pub(crate) content: Content,
    /// Whether it is a list of numbers, padded at its end; each row of a matrix is padded.
    pub(crate) flat: bool,
}

/// Matrices of attention that keep eight bits where four are asked for: those that make and read latents, since much rests on few
/// numbers, and `q_proj`, which is computed together with `kv_a_proj_with_mqa`. Of V3's weights they are 0.3 %.
const LATENT: [&str; 4] = [".q_proj.weight", ".q_a_proj.weight", ".kv_a_proj_with_mqa.weight", ".kv_b_proj.weight"];

/// A matrix as lowering needs it.
#[derive(Clone, Debug)]
pub struct Matrix {
    /// Index into the plan's weights.
    pub weight: u32,
    /// Index of its scales, if it has any.
    pub scales: Option<u32>,
    /// How it is stored.
    pub stored: Stored,
    /// First slice and number of slices of each shard.
    pub shards: Vec<(u64, u64)>,
    /// Bytes of a row, with the scales of its groups; those of blocks, which many rows share, are left out.
    pub row_bytes: u64,
}

/// Collects the weights of all programs.
#[derive(Debug)]
pub struct Packer<'a> {
    pub(crate) checkpoint: &'a Checkpoint,
    /// Format that linears and embeddings are converted to; `None` keeps them as stored.
    format: Option<WeightFormat>,
    /// Largest binding.
    limit: u64,
    roles: Arc<HashMap<String, (Role, Part)>>,
    pub(crate) items: Vec<Item>,
    index: HashMap<String, u32>,
    /// Matrices that were to be quantised and are not, and the numbers of their rows.
    unfit: Vec<(String, u64)>,
}

impl<'a> Packer<'a> {
    /// A packer for a checkpoint (which may lack weights: then the plan is made without).
    pub fn new(checkpoint: &'a Checkpoint, format: Option<WeightFormat>, limit: u64) -> Self {
        let roles = tensors::expected(checkpoint.config()).into_iter().map(|t| (t.name, (t.role, t.part))).collect();
        let roles = Arc::new(roles);
        Self { checkpoint, format, limit, roles, items: Vec::new(), index: HashMap::new(), unfit: Vec::new() }
    }

    /// An empty one for the same checkpoint, and another limit.
    pub(crate) fn anew(&self, limit: u64) -> Self {
        let roles = Arc::clone(&self.roles);
        Self { roles, limit, items: Vec::new(), index: HashMap::new(), unfit: Vec::new(), ..*self }
    }

    fn pieces(weight: &WeightRef) -> Vec<Piece> {
        let Some(experts) = weight.experts else { return vec![Piece::whole(weight.name.clone())] };
        let routed = (0..experts).map(|expert| Piece::whole(weight.name.replace('*', &expert.to_string())));
        let mut pieces: Vec<Piece> = routed.collect();
        match &weight.shared {
            Some(shared) if shared.by_columns => {
                let width = weight.shape[1];
                let columns = (0..shared.count).map(|expert| expert * width..(expert + 1) * width);
                pieces.extend(columns.map(|columns| Piece { tensor: shared.name.clone(), columns: Some(columns) }));
            }
            Some(shared) => pieces.push(Piece::whole(shared.name.clone())),
            None => {}
        }
        pieces
    }

    /// Format in which the checkpoint stores a tensor, or would if it had weights.
    fn stored_format(&self, name: &str) -> Result<WeightFormat> {
        let config = self.checkpoint.config();
        let dtype = if self.checkpoint.has_weights() {
            self.checkpoint.tensor(name)?.dtype
        } else if config.quantization.is_some() && matches!(self.roles.get(name), Some((Role::Linear, _))) {
            Dtype::F8E4m3
        } else {
            config.torch_dtype.unwrap_or(Dtype::Bf16)
        };
        match dtype {
            Dtype::F32 => Ok(WeightFormat::F32),
            Dtype::F16 => Ok(WeightFormat::F16),
            Dtype::Bf16 => Ok(WeightFormat::Bf16),
            Dtype::F8E4m3 => Ok(WeightFormat::Fp8),
            other => Err(Error::WrongTensor {
                path: self.checkpoint.dir().into(),
                tensor: name.into(),
                found: other.to_string(),
                expected: "F32, F16, BF16 or F8_E4M3".into(),
            }),
        }
    }

    /// A matrix, or one for each expert. `granule`: rows that must stay together in a shard (experts are never cut).
    pub fn matrix(&mut self, weight: &WeightRef, granule: u64) -> Result<Matrix> {
        let pieces = Self::pieces(weight);
        let stored = self.stored_format(&pieces[0].tensor)?;
        for Piece { tensor: name, .. } in &pieces[1..] {
            let other = self.stored_format(name)?;
            if other != stored {
                return Err(Error::WrongTensor {
                    path: self.checkpoint.dir().into(),
                    tensor: name.clone(),
                    found: other.name().into(),
                    expected: format!("{}, like the other experts of its layer", stored.name()),
                });
            }
        }
        let format = self.format_of(weight, &pieces[0].tensor, stored);
        let (rows, columns) = (weight.shape[0] as u64, weight.shape[1] as u64);
        let shape = weight.all_experts().map(|experts| experts as u64).into_iter().chain([rows, columns]).collect();
        let mut plan = Weight { name: weight.name.clone(), format, shape, shards: Vec::new() };
        let slice = plan.slice_bytes().filter(|bytes| *bytes > 0).expect("checked configurations have sane shapes");
        let granule = if weight.experts.is_some() { 1 } else { granule };
        let fit = self.limit / slice / granule * granule;
        if fit == 0 {
            return Err(Error::Argument {
                what: format!("max_binding_bytes of the target, for tensor `{}`,", weight.name),
                found: self.limit.to_string(),
                expected: format!(
                    "at least {} (one {} of it)",
                    slice * granule,
                    if granule > 1 { "head" } else { "slice" }
                ),
            });
        }
        let mut first = 0;
        while first < plan.shape[0] {
            let count = fit.min(plan.shape[0] - first);
            plan.shards.push(Shard { first, count, segments: Vec::new() });
            first += count;
        }
        let shards = plan.shards.iter().map(|shard| (shard.first, shard.count)).collect();
        let mut row_bytes = columns.next_multiple_of(4) * format.bits() / 8;
        let index = self.add(Item { weight: plan, content: Content::Tensors(pieces.clone()), flat: false });
        let scales = if format == WeightFormat::Fp8 {
            Some(self.scales(weight, &pieces)?)
        } else if format.is_grouped() {
            row_bytes += columns / SCALE_GROUP * WeightFormat::F16.bits() / 8;
            Some(self.group_scales(weight, pieces, format)?)
        } else {
            None
        };
        Ok(Matrix {
            weight: index,
            scales: scales.map(|(index, _)| index),
            stored: Stored { format, scales: scales.map(|(_, scales)| scales) },
            shards,
            row_bytes,
        })
    }

    /// Format in which a matrix, the first tensor of which is `name`, is to stand on the device.
    fn format_of(&mut self, weight: &WeightRef, name: &str, stored: WeightFormat) -> WeightFormat {
        let Some(asked) = self.format else { return stored };
        let format = match self.roles.get(name) {
            // The router is never converted: a rounded logit may choose another expert.
            Some((_, Part::Router)) => return stored,
            // Rows of these are picked or read by column, in kernels that know no four bits.
            Some((_, Part::Embedding | Part::Head | Part::MtpProjection)) if asked == WeightFormat::Int4 => {
                WeightFormat::Int8
            }
            _ if asked == WeightFormat::Int4 && LATENT.iter().any(|part| name.ends_with(part)) => WeightFormat::Int8,
            _ => asked,
        };
        let columns = weight.shape[1] as u64;
        if format.is_grouped() && !columns.is_multiple_of(SCALE_GROUP) {
            if self.unfit.iter().all(|(name, _)| *name != weight.name) {
                self.unfit.push((weight.name.clone(), columns));
            }
            return stored;
        }
        format
    }

    /// What is to be said of matrices that were to be quantised and are not.
    pub(crate) fn warning(&self) -> Option<String> {
        let (name, columns) = self.unfit.first()?;
        Some(format!(
            "{} matrices keep the format they are stored in: their rows do not divide into groups of {SCALE_GROUP} numbers \
             (the first is `{name}` with rows of {columns})",
            self.unfit.len()
        ))
    }

    /// Scales that the compiler will choose, one for each group of a row.
    fn group_scales(&mut self, weight: &WeightRef, pieces: Vec<Piece>, format: WeightFormat) -> Result<(u32, Scales)> {
        let (rows, columns) = (weight.shape[0], weight.shape[1] / SCALE_GROUP as usize);
        let length = (rows * columns * weight.all_experts().unwrap_or(1)) as u64;
        let name = scale_name(&weight.name);
        let index = self.add_flat(name, WeightFormat::F16, length, Content::Scales(pieces, format))?;
        Ok((index, Scales { rows, columns, block: [1, SCALE_GROUP as usize] }))
    }

    fn scales(&mut self, weight: &WeightRef, pieces: &[Piece]) -> Result<(u32, Scales)> {
        let block = self.checkpoint.config().quantization.as_ref().map(|q| q.weight_block_size);
        let block = block.ok_or_else(|| Error::WrongTensor {
            path: self.checkpoint.dir().into(),
            tensor: pieces[0].tensor.clone(),
            found: "F8_E4M3".into(),
            expected: "another dtype, since config.json has no quantization_config".into(),
        })?;
        let (rows, columns) = (weight.shape[0].div_ceil(block[0]), weight.shape[1].div_ceil(block[1]));
        let pieces = pieces.iter().map(|Piece { tensor, columns }| Piece {
            tensor: format!("{tensor}_scale_inv"),
            columns: columns.as_ref().map(|columns| columns.start / block[1]..columns.end / block[1]),
        });
        let content = Content::Tensors(pieces.collect());
        let length = (rows * columns * weight.all_experts().unwrap_or(1)) as u64;
        let name = format!("{}_scale_inv", weight.name);
        let index = self.add_flat(name, WeightFormat::F32, length, content)?;
        Ok((index, Scales { rows, columns, block }))
    }

    /// A vector, kept in f32.
    pub fn vector(&mut self, weight: &WeightRef) -> Result<u32> {
        let content = Content::Tensors(vec![Piece::whole(weight.name.clone())]);
        self.add_flat(weight.name.clone(), WeightFormat::F32, weight.shape[0] as u64, content)
    }

    /// Numbers that the compiler made.
    pub fn generated(&mut self, name: &str, numbers: impl FnOnce() -> Vec<f32>) -> Result<u32> {
        if let Some(index) = self.index.get(name) {
            return Ok(*index);
        }
        let numbers = numbers();
        self.add_flat(name.into(), WeightFormat::F32, numbers.len() as u64, Content::Generated(numbers))
    }

    fn add_flat(&mut self, name: String, format: WeightFormat, length: u64, content: Content) -> Result<u32> {
        let shard = Shard { first: 0, count: 1, segments: Vec::new() };
        let weight = Weight { name, format, shape: vec![1, length], shards: vec![shard] };
        let bytes = weight.slice_bytes().unwrap_or(u64::MAX);
        if bytes > self.limit {
            return Err(Error::Argument {
                what: format!("max_binding_bytes of the target, for tensor `{}`,", weight.name),
                found: self.limit.to_string(),
                expected: format!("at least {bytes}"),
            });
        }
        Ok(self.add(Item { weight, content, flat: true }))
    }

    fn add(&mut self, item: Item) -> u32 {
        let next = self.items.len() as u32;
        let index = *self.index.entry(item.weight.name.clone()).or_insert(next);
        if index == next {
            self.items.push(item);
        }
        index
    }

    /// The weights without bytes, for a plan that is made without them, and warnings.
    pub fn without_weights(self) -> (Vec<WeightFile>, Vec<Weight>, Vec<String>) {
        let warnings = self.warning().into_iter().collect();
        (Vec::new(), self.items.into_iter().map(|item| item.weight).collect(), warnings)
    }
}

/// Name of the scales that the compiler chose for a weight or a tensor.
pub(crate) fn scale_name(name: &str) -> String {
    format!("{name}_scale")
}

/// Gives each shard of `item` its segments. `place` says where a tensor stands (padded for matrices), `zeros` where some zero
/// bytes stand, for padding behind flat lists.
pub(crate) fn place_item(item: &mut Item, place: impl Fn(&str) -> Segment, zeros: Option<Segment>) {
    let Item { weight, content, flat } = item;
    let slice = weight.slice_bytes().expect("checked when it was added");
    let stacked = weight.shape.len() == 3;
    let parts: Vec<Segment> = match content {
        Content::Tensors(pieces) => pieces.iter().map(|piece| place(&piece.name())).collect(),
        Content::Scales(pieces, _) => pieces.iter().map(|piece| place(&scale_name(&piece.name()))).collect(),
        Content::Generated(_) => vec![place(&weight.name)],
    };
    // Shared experts that have rows of one tensor are one part.
    let slices = |part: Segment| {
        (0..part.bytes / slice).map(move |at| Segment { offset: part.offset + at * slice, bytes: slice, ..part })
    };
    let experts: Vec<Segment> = if stacked { parts.iter().copied().flat_map(slices).collect() } else { Vec::new() };
    for shard in &mut weight.shards {
        shard.segments = if *flat {
            let missing = slice - parts.iter().map(|segment| segment.bytes).sum::<u64>();
            let padding = zeros.filter(|_| missing > 0).map(|zeros| Segment { bytes: missing, ..zeros });
            parts.iter().copied().chain(padding).collect()
        } else if stacked {
            experts[shard.first as usize..(shard.first + shard.count) as usize].to_vec()
        } else {
            let offset = parts[0].offset + shard.first * slice;
            vec![Segment { offset, bytes: shard.count * slice, ..parts[0] }]
        };
    }
}
