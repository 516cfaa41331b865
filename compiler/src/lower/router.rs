//! Steps of a router.

use moewe_plan::{Cost, DType, Dim, ParameterKind, Role, Symbol};

use super::{Lowering, ONE, Slot};
use crate::error::Result;
use crate::graph::{Node, Norm, RouterRule, Value, WeightId};
use crate::select::{self, Routing};

/// Name of the counts of workgroups that have left their logits; zeros between dispatches.
const ARRIVED: &str = "router.arrived";

impl Lowering<'_, '_> {
    /// Ids and weights from logits.
    pub(super) fn router(
        &mut self,
        node: &Node,
        logits: Value,
        routed: Routed,
        [ids, weights]: [Value; 2],
    ) -> Result<()> {
        let mut slots =
            vec![("logits", Slot::Value(logits)), ("ids", Slot::Value(ids)), ("weights", Slot::Value(weights))];
        let variant = select::router(&self.routing(node, routed, &mut slots)?);
        let cost = Cost { token_bytes: routed.bytes(), ..Cost::default() };
        self.emit(node, &variant, &slots, [Dim::Symbol(Symbol::Tokens), ONE, ONE], [0; 4], cost)
    }

    /// The same with the product before it, in one step where tokens do not share rows of it and a kernel can bind all that it
    /// needs, else in two.
    pub(super) fn router_product(
        &mut self,
        node: &Node,
        weight: WeightId,
        norm: Option<Norm>,
        routed: Routed,
        [ids, weights, logits]: [Value; 3],
    ) -> Result<()> {
        let x = node.inputs[0];
        let matrix = self.matrix(weight, 1)?;
        let mut slots = vec![
            ("x", Slot::Value(x)),
            ("logits", Slot::Value(logits)),
            ("ids", Slot::Value(ids)),
            ("weights", Slot::Value(weights)),
            ("w", Slot::Weight(matrix.weight, 0)),
        ];
        let eps = self.norm(norm, &mut slots)?;
        let routing = self.routing(node, routed, &mut slots)?;
        let k = self.len(x);
        let alone = self.selector.tile == 1 && matrix.scales.is_none() && matrix.shards.len() == 1;
        let variant = self.selector.router_product(matrix.stored, k, eps, &routing);
        if !alone || !self.fits(&variant)? {
            self.linear(node, weight, None, norm, logits)?;
            return self.router(node, logits, routed, [ids, weights]);
        }
        // A buffer of its own: nothing else may be written there between two dispatches.
        let arrived = self.shared.buffers.get(ARRIVED, DType::U32, Dim::Symbol(Symbol::Tokens), Role::Scratch);
        slots.push(("arrived", Slot::Buffer(arrived)));
        let experts = routed.rule.experts as u64;
        let cost = Cost {
            fixed_bytes: experts * matrix.row_bytes,
            token_bytes: routed.bytes() + 4 * k as u64,
            token_flops: 2 * experts * k as u64,
            ..Cost::default()
        };
        let groups = experts.div_ceil(self.selector.rows_per_workgroup("router_product"));
        self.emit(node, &variant, &slots, [Dim::Const(groups), Dim::Symbol(Symbol::Tokens), ONE], [0; 4], cost)
    }

    /// What the choosing binds beside logits and results, and how it goes.
    fn routing<'r>(
        &mut self,
        node: &Node,
        routed: Routed<'r>,
        slots: &mut Vec<(&'static str, Slot)>,
    ) -> Result<Routing<'r>> {
        let Routed { rule, bias, shared } = routed;
        if let Some(bias) = bias {
            slots.push(("bias", self.vector(bias)?));
        }
        let edit = self.graph.parameters;
        if edit {
            slots.extend([
                ("expert_offset", self.parameter(node, ParameterKind::ExpertOffset, rule.experts)?),
                ("expert_scale", self.parameter(node, ParameterKind::ExpertScale, rule.experts)?),
            ]);
        }
        Ok(Routing { rule, bias: bias.is_some(), shared, edit })
    }
}

/// What a router is to do, as the graph says it.
#[derive(Clone, Copy)]
pub(super) struct Routed<'a> {
    pub(super) rule: &'a RouterRule,
    pub(super) bias: Option<WeightId>,
    pub(super) shared: usize,
}

impl Routed<'_> {
    /// Bytes of logits, ids and weights of a token.
    fn bytes(&self) -> u64 {
        4 * (self.rule.experts + 2 * (self.rule.top_k + self.shared)) as u64
    }
}
