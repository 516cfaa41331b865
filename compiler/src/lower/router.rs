//! Steps of a router.

use moewe_plan::{Cost, DType, Dim, ParameterKind, Role, Symbol};

use super::{Lowering, ONE, Slot};
use crate::error::Result;
use crate::graph::{Node, Norm, RouterRule, Value, WeightId};
use crate::select;

/// Name of the counts of workgroups that have left their logits; zeros between dispatches.
const ARRIVED: &str = "router.arrived";

impl Lowering<'_, '_> {
    /// Ids and weights from logits.
    pub(super) fn router(
        &mut self,
        node: &Node,
        logits: Value,
        rule: &RouterRule,
        bias: Option<WeightId>,
        shared: usize,
        [ids, weights]: [Value; 2],
    ) -> Result<()> {
        let mut slots =
            vec![("logits", Slot::Value(logits)), ("ids", Slot::Value(ids)), ("weights", Slot::Value(weights))];
        let edit = self.routing(node, rule, bias, &mut slots)?;
        let variant = select::router(rule, bias.is_some(), shared, edit);
        let cost = Cost { token_bytes: routing_bytes(rule, shared), ..Cost::default() };
        self.emit(node, &variant, &slots, [Dim::Symbol(Symbol::Tokens), ONE, ONE], [0; 4], cost)
    }

    /// The same with the product before it, in one step where tokens do not share rows of it and a kernel can bind all that it
    /// needs, else in two.
    pub(super) fn router_product(
        &mut self,
        node: &Node,
        weight: WeightId,
        norm: Option<Norm>,
        rule: &RouterRule,
        bias: Option<WeightId>,
        shared: usize,
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
        let edit = self.routing(node, rule, bias, &mut slots)?;
        let k = self.len(x);
        let alone = self.selector.tile == 1 && matrix.scales.is_none() && matrix.shards.len() == 1;
        let variant = self.selector.router_product(matrix.stored, k, eps, rule, bias.is_some(), shared, edit);
        if !alone || !self.fits(&variant)? {
            self.linear(node, weight, None, norm, logits)?;
            return self.router(node, logits, rule, bias, shared, [ids, weights]);
        }
        // A buffer of its own: nothing else may be written there between two dispatches.
        let arrived = self.shared.buffers.get(ARRIVED, DType::U32, Dim::Symbol(Symbol::Tokens), Role::Scratch);
        slots.push(("arrived", Slot::Buffer(arrived)));
        let experts = rule.experts as u64;
        let cost = Cost {
            fixed_bytes: experts * matrix.row_bytes,
            token_bytes: routing_bytes(rule, shared) + 4 * k as u64,
            token_flops: 2 * experts * k as u64,
            ..Cost::default()
        };
        let groups = experts.div_ceil(self.selector.rows_per_workgroup());
        self.emit(node, &variant, &slots, [Dim::Const(groups), Dim::Symbol(Symbol::Tokens), ONE], [0; 4], cost)
    }

    /// What the choosing binds beside logits and results. Whether parameters change it.
    fn routing(
        &mut self,
        node: &Node,
        rule: &RouterRule,
        bias: Option<WeightId>,
        slots: &mut Vec<(&'static str, Slot)>,
    ) -> Result<bool> {
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
        Ok(edit)
    }
}

/// Bytes of logits, ids and weights of a token.
fn routing_bytes(rule: &RouterRule, shared: usize) -> u64 {
    4 * (rule.experts + 2 * (rule.top_k + shared)) as u64
}
