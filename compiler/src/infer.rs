//! Types of what each operation gives, and all that must hold of its inputs and weights.

use moewe_plan::DType;

use crate::graph::{
    Asked, Graph, GraphError, Mla, Norm, Op, RouterRule, Rows, TensorType, Value, WeightId, WeightRef, list, top_tokens,
};

/// Types of the outputs of `op` on `inputs`, or what is wrong with the inputs or the weights that it names.
pub fn output_types(graph: &Graph, op: &Op, inputs: &[Value]) -> Result<Vec<TensorType>, String> {
    let on = Operands { graph, inputs };
    // What was sampled for wanted rows tells what follows tokens.
    if *op != Op::TopTokens(Asked::Next) {
        on.same_rows()?;
    }
    match op {
        Op::Embed { .. }
        | Op::ReadState { .. }
        | Op::WriteState { .. }
        | Op::GatherRows
        | Op::Sample
        | Op::Logprobs
        | Op::Accept
        | Op::Propose
        | Op::TopTokens(_) => ends(&on, op),
        Op::RmsNorm(_)
        | Op::Linear { .. }
        | Op::Silu
        | Op::Mul
        | Op::Add
        | Op::Concat
        | Op::Slice { .. }
        | Op::LinearPair { .. }
        | Op::GateUp { .. }
        | Op::MtpJoin { .. } => dense(&on, op),
        Op::Rope { .. }
        | Op::CacheWrite { .. }
        | Op::Attention { .. }
        | Op::LatentWrite { .. }
        | Op::AbsorbQuery { .. }
        | Op::AbsorbWrite { .. }
        | Op::LatentAttention { .. }
        | Op::AbsorbOutput { .. } => attention(&on, op),
        Op::RouterScore(_)
        | Op::RouterBias { .. }
        | Op::GroupLimit(_)
        | Op::TopK { .. }
        | Op::RouterWeights(_)
        | Op::ExpertLinear { .. }
        | Op::WeightedSum
        | Op::Router { .. }
        | Op::RouterProduct { .. }
        | Op::ExpertGateUp { .. }
        | Op::ExpertDown { .. } => experts(&on, op),
    }
}

type Types = Result<Vec<TensorType>, String>;

/// Operations at the two ends of a program, and those that change what rows are.
fn ends(on: &Operands, op: &Op) -> Types {
    match op {
        Op::Embed { weight } => {
            on.count(0)?;
            let [_, hidden] = on.matrix("embedding", *weight)?;
            Ok(vec![TensorType::tokens(&[hidden])])
        }
        Op::ReadState { len, .. } => {
            on.count(0)?;
            Ok(vec![TensorType::tokens(&[*len])])
        }
        Op::WriteState { .. } => {
            on.count(1)?;
            on.vector(0, "x")?;
            Ok(vec![on.ty(0)?.clone()])
        }
        Op::GatherRows => {
            on.count(1)?;
            on.tokens()?;
            on.vector(0, "x")?;
            Ok(vec![TensorType { rows: Rows::Wanted, ..on.ty(0)?.clone() }])
        }
        Op::Sample => {
            on.count(1)?;
            on.wanted()?;
            on.vector(0, "logits")?;
            on.ids(1)
        }
        Op::Logprobs => {
            on.count(2)?;
            on.wanted()?;
            if on.vector(0, "logits")? == 0 {
                return Err("no logits".into());
            }
            on.input(1, "token", DType::U32, &[1])?;
            Ok(Vec::new())
        }
        Op::TopTokens(asked) => {
            on.count(if *asked == Asked::Nothing { 1 } else { 2 })?;
            let vocab = on.vector(0, "logits")?;
            if vocab == 0 {
                return Err("no logits".into());
            }
            let k = top_tokens(vocab);
            match asked {
                Asked::Nothing => return Ok([on.ids(k)?, on.floats(&[k])?].concat()),
                Asked::Next => {
                    let sampled = TensorType { dtype: DType::U32, rows: Rows::Wanted, shape: vec![1] };
                    if *on.ty(1)? != sampled {
                        return Err(format!("sampled token is {}, {sampled} expected", on.ty(1)?));
                    }
                }
                Asked::Given => on.input(1, "given ids", DType::U32, &[k])?,
            }
            Ok([on.ids(k)?, on.floats(&[k])?, on.floats(&[3])?].concat())
        }
        _ => {
            on.count(1)?;
            on.wanted()?;
            on.input(0, "token", DType::U32, &[1])?;
            Ok(Vec::new())
        }
    }
}

/// Operations on each row alone that have no experts.
fn dense(on: &Operands, op: &Op) -> Types {
    match op {
        Op::RmsNorm(norm) => {
            on.count(1)?;
            let len = on.vector(0, "x")?;
            on.norm("norm", norm, len)?;
            on.floats(&[len])
        }
        Op::Linear { weight, bias, norm } => {
            on.count(if on.inputs.len() == 2 { 2 } else { 1 })?;
            let len = on.vector(0, "x")?;
            let rows = on.rows_of("weight", *weight, len)?;
            if on.inputs.len() == 2 {
                on.input(1, "residual", DType::F32, &[rows])?;
            }
            if let Some(bias) = bias {
                on.weight("bias", *bias, false, &[rows])?;
            }
            on.maybe_norm(norm.as_ref(), len)?;
            on.floats(&[rows])
        }
        Op::Silu => {
            on.count(1)?;
            let len = on.any_floats(0, "x")?;
            on.floats(&len)
        }
        Op::Mul | Op::Add => {
            on.count(2)?;
            let shape = on.any_floats(0, "left")?;
            on.input(1, "right", DType::F32, &shape)?;
            on.floats(&shape)
        }
        Op::Concat => {
            on.count(2)?;
            let len = on.vector(0, "left")? + on.vector(1, "right")?;
            on.floats(&[len])
        }
        Op::Slice { start, len } => {
            on.count(1)?;
            let found = on.vector(0, "x")?;
            if *len == 0 || start.checked_add(*len).is_none_or(|end| end > found) {
                return Err(format!("slice of {len} numbers from {start} on, x has {found}"));
            }
            on.floats(&[*len])
        }
        Op::LinearPair { first, second, norm } => {
            on.count(1)?;
            let len = on.vector(0, "x")?;
            on.maybe_norm(norm.as_ref(), len)?;
            let rows = [on.rows_of("first", *first, len)?, on.rows_of("second", *second, len)?];
            Ok([on.floats(&[rows[0]])?, on.floats(&[rows[1]])?].concat())
        }
        Op::GateUp { gate, up, norm } => {
            on.count(1)?;
            let len = on.vector(0, "x")?;
            let rows = on.rows_of("gate", *gate, len)?;
            on.weight("up", *up, false, &[rows, len])?;
            on.maybe_norm(norm.as_ref(), len)?;
            on.floats(&[rows])
        }
        Op::MtpJoin { enorm, hnorm } => {
            on.count(2)?;
            let (e, h) = (on.vector(0, "embedding")?, on.vector(1, "hidden")?);
            on.norm("enorm", enorm, e)?;
            on.norm("hnorm", hnorm, h)?;
            on.floats(&[e + h])
        }
        _ => Err(not_here(op)),
    }
}

/// Operations of multi-head latent attention.
fn attention(on: &Operands, op: &Op) -> Types {
    on.tokens()?;
    match op {
        Op::Rope { heads, head_dim, rope } => {
            on.count(1)?;
            if *rope == 0 || !rope.is_multiple_of(2) || rope > head_dim {
                return Err(format!(
                    "{rope} rotated numbers of a head of {head_dim}, an even number up to that expected"
                ));
            }
            on.input(0, "x", DType::F32, &[heads * head_dim])?;
            on.floats(&[heads * head_dim])
        }
        Op::CacheWrite { .. } => {
            on.count(2)?;
            let len = on.vector(0, "latent")? + on.vector(1, "rope key")?;
            on.floats(&[len])
        }
        Op::Attention { layer, kv_b, mla } => {
            on.count(2)?;
            on.input(0, "query", DType::F32, &[mla.heads * (mla.nope + mla.rope)])?;
            on.cache(1, *layer, mla)?;
            on.kv_b(*kv_b, mla)?;
            Ok([on.floats(&[mla.heads * mla.v])?, on.floats(&[mla.heads, mla.rank + mla.rope])?].concat())
        }
        Op::LatentWrite { norm, mla, .. } => {
            on.count(1)?;
            on.input(0, "latent and rope key", DType::F32, &[mla.rank + mla.rope])?;
            on.norm("norm", norm, mla.rank)?;
            on.floats(&[mla.rank + mla.rope])
        }
        Op::AbsorbQuery { kv_b, mla, .. } => {
            on.count(1)?;
            on.input(0, "query", DType::F32, &[mla.heads * (mla.nope + mla.rope)])?;
            on.kv_b(*kv_b, mla)?;
            on.floats(&[mla.heads, mla.rank + mla.rope])
        }
        Op::AbsorbWrite { kv_b, norm, mla, .. } => {
            on.count(2)?;
            on.input(0, "query", DType::F32, &[mla.heads * (mla.nope + mla.rope)])?;
            on.kv_b(*kv_b, mla)?;
            on.input(1, "latent and rope key", DType::F32, &[mla.rank + mla.rope])?;
            on.norm("norm", norm, mla.rank)?;
            let width = mla.rank + mla.rope;
            Ok([on.floats(&[mla.heads, width])?, on.floats(&[width])?].concat())
        }
        Op::LatentAttention { layer, mla } => {
            on.count(2)?;
            on.input(0, "query", DType::F32, &[mla.heads, mla.rank + mla.rope])?;
            on.cache(1, *layer, mla)?;
            on.floats(&[mla.heads, mla.rank])
        }
        Op::AbsorbOutput { kv_b, mla } => {
            on.count(1)?;
            on.input(0, "attended latents", DType::F32, &[mla.heads, mla.rank])?;
            on.kv_b(*kv_b, mla)?;
            on.floats(&[mla.heads * mla.v])
        }
        _ => Err(not_here(op)),
    }
}

/// Operations of the router and of routed experts.
fn experts(on: &Operands, op: &Op) -> Types {
    match op {
        Op::RouterScore(_) => {
            on.count(1)?;
            let experts = on.vector(0, "logits")?;
            on.floats(&[experts])
        }
        Op::RouterBias { bias } => {
            on.count(1)?;
            let experts = on.vector(0, "scores")?;
            on.weight("bias", *bias, false, &[experts])?;
            on.floats(&[experts])
        }
        Op::GroupLimit(rule) => {
            on.count(1)?;
            check_rule(rule)?;
            on.input(0, "selection scores", DType::F32, &[rule.experts])?;
            on.floats(&[rule.experts])
        }
        Op::TopK { k } => {
            on.count(1)?;
            let experts = on.vector(0, "selection scores")?;
            if *k == 0 || *k > experts {
                return Err(format!("the best {k} of {experts}, 1 to {experts} expected"));
            }
            on.ids(*k)
        }
        Op::RouterWeights(rule) => {
            on.count(2)?;
            check_rule(rule)?;
            on.input(0, "scores", DType::F32, &[rule.experts])?;
            on.input(1, "ids", DType::U32, &[rule.top_k])?;
            on.floats(&[rule.top_k])
        }
        Op::ExpertLinear { weight } => {
            on.count(2)?;
            let k = on.id_count(1)?;
            let len = match on.any_floats(0, "x")?[..] {
                [len] => len,
                [found, len] if found == k => len,
                _ => return Err(format!("x is {}, f32[…, K] or f32[…, {k}, K] expected", on.ty(0)?)),
            };
            let rows = on.expert_rows_of("weight", *weight, len)?;
            on.floats(&[k, rows])
        }
        Op::WeightedSum => {
            on.count(2)?;
            let [k, len] = on.matrix_input(0, "y")?;
            on.input(1, "weights", DType::F32, &[k])?;
            on.floats(&[len])
        }
        Op::Router { rule, bias, shared } => {
            on.count(1)?;
            on.input(0, "logits", DType::F32, &[rule.experts])?;
            on.routes(rule, *bias, *shared)
        }
        Op::RouterProduct { weight, norm, rule, bias, shared } => {
            on.count(1)?;
            let len = on.vector(0, "x")?;
            on.maybe_norm(norm.as_ref(), len)?;
            on.weight("weight", *weight, false, &[rule.experts, len])?;
            Ok([on.routes(rule, *bias, *shared)?, on.floats(&[rule.experts])?].concat())
        }
        Op::ExpertGateUp { gate, up, norm } => {
            on.count(2)?;
            let (len, k) = (on.vector(0, "x")?, on.id_count(1)?);
            let rows = on.expert_rows_of("gate", *gate, len)?;
            on.weight("up", *up, true, &[rows, len])?;
            let experts = |id| on.weight_ref("weight", id).map(WeightRef::all_experts);
            if experts(*gate)? != experts(*up)? {
                return Err("gate and up have different numbers of experts".into());
            }
            on.maybe_norm(norm.as_ref(), len)?;
            on.floats(&[k, rows])
        }
        Op::ExpertDown { weight } => {
            on.count(4)?;
            let k = on.id_count(1)?;
            let [found, len] = on.matrix_input(0, "y")?;
            if found != k {
                return Err(format!("y has rows of {found} experts, {k} expected as there are ids"));
            }
            on.input(2, "weights", DType::F32, &[k])?;
            let rows = on.expert_rows_of("weight", *weight, len)?;
            on.input(3, "residual", DType::F32, &[rows])?;
            on.floats(&[rows])
        }
        _ => Err(not_here(op)),
    }
}

fn not_here(op: &Op) -> String {
    format!("no rule for the types of {}", op.name())
}

fn check_rule(rule: &RouterRule) -> Result<(), String> {
    let RouterRule { experts, top_k, n_group, topk_group, .. } = *rule;
    if top_k == 0 || top_k > experts {
        return Err(format!("the best {top_k} of {experts} experts, 1 to {experts} expected"));
    }
    if n_group == 0 || !experts.is_multiple_of(n_group) {
        return Err(format!("{n_group} groups of {experts} experts, a divisor expected"));
    }
    if topk_group == 0 || topk_group > n_group || topk_group * (experts / n_group) < top_k {
        return Err(format!("{topk_group} of {n_group} groups kept, enough for {top_k} experts expected"));
    }
    Ok(())
}

/// The inputs of one operation, and the graph whose weights it names.
struct Operands<'a> {
    graph: &'a Graph,
    inputs: &'a [Value],
}

impl Operands<'_> {
    fn count(&self, expected: usize) -> Result<(), String> {
        match self.inputs.len() {
            found if found == expected => Ok(()),
            found => Err(format!("{found} inputs, {expected} expected")),
        }
    }

    fn ty(&self, at: usize) -> Result<&TensorType, String> {
        let value = self.inputs.get(at).ok_or_else(|| format!("input {at} is missing"))?;
        let node = self.graph.nodes.get(value.node);
        node.and_then(|n| n.outputs.get(value.output)).ok_or_else(|| format!("input {value} does not exist"))
    }

    fn same_rows(&self) -> Result<(), String> {
        for at in 1..self.inputs.len() {
            let (first, other) = (self.ty(0)?, self.ty(at)?);
            if first.rows != other.rows {
                return Err(format!("inputs have different rows: {first} and {other}"));
            }
        }
        Ok(())
    }

    fn tokens(&self) -> Result<(), String> {
        match self.ty(0)? {
            ty if ty.rows == Rows::Tokens => Ok(()),
            ty => Err(format!("input is {ty}, a row for each token (T) expected")),
        }
    }

    fn wanted(&self) -> Result<(), String> {
        match self.ty(0)? {
            ty if ty.rows == Rows::Wanted => Ok(()),
            ty => Err(format!("input is {ty}, only wanted rows (R) expected")),
        }
    }

    /// Checks that input `at` has this type.
    fn input(&self, at: usize, what: &str, dtype: DType, shape: &[usize]) -> Result<(), String> {
        let found = self.ty(at)?;
        let expected = TensorType { dtype, rows: found.rows, shape: shape.to_vec() };
        if *found == expected { Ok(()) } else { Err(format!("{what} is {found}, {expected} expected")) }
    }

    /// Shape of input `at`, which must be floats.
    fn any_floats(&self, at: usize, what: &str) -> Result<Vec<usize>, String> {
        let found = self.ty(at)?;
        match found.dtype {
            DType::F32 => Ok(found.shape.clone()),
            DType::U32 => Err(format!("{what} is {found}, f32 expected")),
        }
    }

    /// Length of the rows of input `at`, which must be plain rows of floats.
    fn vector(&self, at: usize, what: &str) -> Result<usize, String> {
        match self.any_floats(at, what)?[..] {
            [len] => Ok(len),
            _ => Err(format!("{what} is {}, one number of columns expected", self.ty(at)?)),
        }
    }

    /// Shape of input `at`, whose rows must be matrices of floats.
    fn matrix_input(&self, at: usize, what: &str) -> Result<[usize; 2], String> {
        let shape = self.any_floats(at, what)?;
        shape
            .try_into()
            .map_err(|_| format!("{what} is {}, a matrix in each row expected", self.ty(at).expect("checked")))
    }

    /// How many expert ids input `at` has.
    fn id_count(&self, at: usize) -> Result<usize, String> {
        match self.ty(at)? {
            TensorType { dtype: DType::U32, shape, .. } if shape.len() == 1 => Ok(shape[0]),
            found => Err(format!("ids are {found}, u32[…, k] expected")),
        }
    }

    /// Checks that input `at` is a row of the latent cache of this layer.
    fn cache(&self, at: usize, layer: usize, mla: &Mla) -> Result<(), String> {
        self.input(at, "cache", DType::F32, &[mla.rank + mla.rope])?;
        match &self.graph.nodes[self.inputs[at].node].op {
            Op::CacheWrite { layer: found }
            | Op::LatentWrite { layer: found, .. }
            | Op::AbsorbWrite { layer: found, .. }
                if *found == layer =>
            {
                Ok(())
            }
            Op::CacheWrite { layer: found }
            | Op::LatentWrite { layer: found, .. }
            | Op::AbsorbWrite { layer: found, .. } => {
                Err(format!("cache is that of layer {found}, that of layer {layer} expected"))
            }
            other => Err(format!("cache comes from {}, CacheWrite or LatentWrite expected", other.name())),
        }
    }

    fn weight_ref(&self, what: &str, id: WeightId) -> Result<&WeightRef, String> {
        self.graph.weights.get(id).ok_or_else(|| format!("{what} is weight {id}, which does not exist"))
    }

    /// Checks that a weight has this shape, and one tensor for each expert or not.
    fn weight(&self, what: &str, id: WeightId, experts: bool, shape: &[usize]) -> Result<(), String> {
        let weight = self.weight_ref(what, id)?;
        if weight.experts.is_some() != experts {
            let expected = if experts { "one for each expert" } else { "one tensor" };
            return Err(format!("{what} {}: {expected} expected", weight.name));
        }
        if weight.shape != shape {
            return Err(format!("{what} {} has shape {:?}, {shape:?} expected", weight.name, weight.shape));
        }
        Ok(())
    }

    /// Ids and weights of a router.
    fn routes(&self, rule: &RouterRule, bias: Option<WeightId>, shared: usize) -> Types {
        check_rule(rule)?;
        if let Some(bias) = bias {
            self.weight("bias", bias, false, &[rule.experts])?;
        }
        let slots = rule.top_k + shared;
        Ok([self.ids(slots)?, self.floats(&[slots])?].concat())
    }

    /// Shape of a weight that must be one matrix.
    fn matrix(&self, what: &str, id: WeightId) -> Result<[usize; 2], String> {
        let weight = self.weight_ref(what, id)?;
        match (weight.experts, &weight.shape[..]) {
            (None, &[rows, columns]) => Ok([rows, columns]),
            _ => Err(format!("{what} {} has shape {:?}, one matrix expected", weight.name, weight.shape)),
        }
    }

    /// Rows of a weight that must be one matrix of `columns` columns.
    fn rows_of(&self, what: &str, id: WeightId, columns: usize) -> Result<usize, String> {
        let rows = self.weight_ref(what, id)?.shape.first().copied().unwrap_or(0);
        self.weight(what, id, false, &[rows, columns])?;
        Ok(rows)
    }

    /// Rows of a weight that must be a matrix of `columns` columns for each expert.
    fn expert_rows_of(&self, what: &str, id: WeightId, columns: usize) -> Result<usize, String> {
        let rows = self.weight_ref(what, id)?.shape.first().copied().unwrap_or(0);
        self.weight(what, id, true, &[rows, columns])?;
        Ok(rows)
    }

    fn norm(&self, what: &str, norm: &Norm, len: usize) -> Result<(), String> {
        self.weight(what, norm.weight, false, &[len])
    }

    fn maybe_norm(&self, norm: Option<&Norm>, len: usize) -> Result<(), String> {
        norm.map_or(Ok(()), |norm| self.norm("norm", norm, len))
    }

    fn kv_b(&self, id: WeightId, mla: &Mla) -> Result<(), String> {
        self.weight("kv_b", id, false, &[mla.heads * (mla.nope + mla.v), mla.rank])
    }

    /// Floats of this shape, with the rows of the first input.
    fn floats(&self, shape: &[usize]) -> Types {
        Ok(vec![TensorType { dtype: DType::F32, rows: self.ty(0)?.rows, shape: shape.to_vec() }])
    }

    /// This many integers, with the rows of the first input.
    fn ids(&self, count: usize) -> Types {
        Ok(vec![TensorType { dtype: DType::U32, rows: self.ty(0)?.rows, shape: vec![count] }])
    }
}

impl Graph {
    /// Checks order, types and weight shapes of every node.
    pub fn verify(&self) -> Result<(), GraphError> {
        for (id, node) in self.nodes.iter().enumerate() {
            let fail = |what: String| GraphError { node: id, label: node.label.clone(), what };
            for input in &node.inputs {
                let known = input.node < id && input.output < self.nodes[input.node].outputs.len();
                if !known {
                    return Err(fail(format!("input {input} does not come before it")));
                }
            }
            let expected = output_types(self, &node.op, &node.inputs).map_err(fail)?;
            if expected != node.outputs {
                let (found, expected) = (list(&node.outputs), list(&expected));
                return Err(fail(format!("{} has outputs ({found}), ({expected}) expected", node.op.name())));
            }
        }
        for tap in &self.taps {
            let sound = self.nodes.get(tap.value.node).and_then(|n| n.outputs.get(tap.value.output));
            if sound.is_none_or(|ty| tap.offset + tap.columns > ty.row_len()) {
                let what = format!("tap {} does not fit its tensor", tap.name);
                return Err(GraphError { node: tap.value.node, label: "taps".into(), what });
            }
        }
        Ok(())
    }
}
