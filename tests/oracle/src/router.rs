//! The expert router, step by step: score, selection score, group limit, top-k, weights. Spec §6.
//!
//! All functions work on one token. Ties go to the lowest index everywhere.

use std::collections::BTreeMap;

use crate::ops;

/// How logits become scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scoring {
    /// Softmax over all experts (V2).
    Softmax,
    /// Sigmoid of each logit (V3, Kimi-K2).
    Sigmoid,
}

/// `topk_method`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TopkMethod {
    /// Top-k over all experts.
    Greedy,
    /// V2: top-k in the groups with the best maximum.
    GroupLimitedGreedy,
    /// V3: top-k in the groups with the best sum of two.
    NoauxTc,
}

/// The router's part of config.json (spec §6).
#[derive(Debug, Clone, PartialEq)]
pub struct RouterParams {
    /// `scoring_func`.
    pub scoring: Scoring,
    /// `topk_method`.
    pub method: TopkMethod,
    /// `n_group`; 1 switches the group limit off.
    pub groups: usize,
    /// `topk_group`: groups kept.
    pub topk_group: usize,
    /// k, `num_experts_per_tok`.
    pub top_k: usize,
    /// `norm_topk_prob`: has an effect under sigmoid scoring only (spec §6, the choice stated first).
    pub norm_topk_prob: bool,
    /// `routed_scaling_factor`.
    pub scale: f64,
}

impl RouterParams {
    /// Whether the group step does anything.
    pub fn limits_groups(&self) -> bool {
        self.method != TopkMethod::Greedy && self.groups > 1
    }
}

/// The experts of one token.
#[derive(Debug, Clone, PartialEq)]
pub struct Route {
    /// Expert ids `[k]`, best selection score first.
    pub ids: Vec<usize>,
    /// Final weight of each id `[k]`.
    pub weights: Vec<f64>,
}

impl Route {
    /// The same route in ascending order of expert id, as goldens keep it (spec §10).
    #[must_use]
    pub fn ascending(&self) -> Self {
        let mut pairs: Vec<_> = self.ids.iter().copied().zip(self.weights.iter().copied()).collect();
        pairs.sort_by_key(|&(id, _)| id);
        let (ids, weights) = pairs.into_iter().unzip();
        Self { ids, weights }
    }
}

/// s `[E]` from router logits `[E]`.
pub fn scores(logits: &[f64], scoring: Scoring) -> Vec<f64> {
    match scoring {
        Scoring::Softmax => ops::softmax(logits),
        Scoring::Sigmoid => logits.iter().map(|&g| ops::sigmoid(g)).collect(),
    }
}

/// u = s + e_score_correction_bias, `[E]`; a missing bias is zero.
pub fn selection_scores(scores: &[f64], bias: Option<&[f64]>) -> Vec<f64> {
    bias.map_or_else(|| scores.to_vec(), |bias| ops::add(scores, bias))
}

/// Score of each group `[groups]` from u `[E]`, the groups being E/groups consecutive experts: the maximum under softmax,
/// the sum of the two largest under sigmoid.
pub fn group_scores(selection: &[f64], groups: usize, scoring: Scoring) -> Vec<f64> {
    assert_eq!(selection.len() % groups, 0, "{} experts do not make {groups} groups", selection.len());
    let counted = match scoring {
        Scoring::Softmax => 1,
        Scoring::Sigmoid => 2,
    };
    let score = |group: &[f64]| top_k(group, counted.min(group.len())).into_iter().map(|e| group[e]).sum();
    selection.chunks_exact(selection.len() / groups).map(score).collect()
}

/// u `[E]` with −∞ (not 0) for the experts of all but the `topk_group` best groups.
pub fn limit_groups(selection: &[f64], groups: usize, topk_group: usize, scoring: Scoring) -> Vec<f64> {
    let kept = top_k(&group_scores(selection, groups, scoring), topk_group);
    let size = selection.len() / groups;
    let limit = |(e, &u): (usize, &f64)| {
        if kept.contains(&(e / size)) { u } else { f64::NEG_INFINITY }
    };
    selection.iter().enumerate().map(limit).collect()
}

/// Indices of the k largest values, largest first, the lower index first among equals.
pub fn top_k(values: &[f64], k: usize) -> Vec<usize> {
    assert!(k <= values.len(), "top-{k} of {} values", values.len());
    let mut order: Vec<usize> = (0..values.len()).collect();
    // The sort is stable, so equal values stay in index order.
    order.sort_by(|&a, &b| values[b].partial_cmp(&values[a]).expect("a router score is NaN"));
    order.truncate(k);
    order
}

/// Final weights of the chosen experts, from the scores *without* bias: s_e, under sigmoid divided by Σ_I s + 1e-20
/// if `norm_topk_prob`, then times `routed_scaling_factor`.
pub fn weights(scores: &[f64], ids: &[usize], params: &RouterParams) -> Vec<f64> {
    let sum: f64 = ids.iter().map(|&e| scores[e]).sum();
    let normalise = params.norm_topk_prob && params.scoring == Scoring::Sigmoid;
    let divisor = if normalise { sum + 1e-20 } else { 1.0 };
    ids.iter().map(|&e| scores[e] / divisor * params.scale).collect()
}

/// The whole router for one token: logits `[E]`, `e_score_correction_bias` `[E]` or nothing.
pub fn route(logits: &[f64], bias: Option<&[f64]>, params: &RouterParams) -> Route {
    let scores = scores(logits, params.scoring);
    let mut selection = selection_scores(&scores, bias);
    if params.limits_groups() {
        selection = limit_groups(&selection, params.groups, params.topk_group, params.scoring);
    }
    let ids = top_k(&selection, params.top_k);
    let weights = weights(&scores, &ids, params);
    Route { ids, weights }
}

/// What is changed about the router of one layer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RouterEdit {
    /// Experts that are taken out, as if they did not exist.
    pub muted: Vec<usize>,
    /// Experts that are chosen whatever their scores and groups.
    pub forced: Vec<usize>,
    /// Added to the selection score u of an expert.
    pub offsets: BTreeMap<usize, f64>,
    /// Multiplies the final weight of an expert.
    pub scales: BTreeMap<usize, f64>,
}

/// [`route`] under an edit. The forced experts come first, in the order of their own u, then the best of the others in the
/// groups that stay. Muted experts do not count in their groups. Where fewer than k are left, the first id is repeated
/// (0 if there is none) with weight 0.
pub fn route_edited(logits: &[f64], bias: Option<&[f64]>, params: &RouterParams, edit: &RouterEdit) -> Route {
    let scores = scores(logits, params.scoring);
    let mut selection = selection_scores(&scores, bias);
    for (&e, offset) in &edit.offsets {
        selection[e] += offset;
    }
    let present: Vec<usize> = (0..scores.len()).filter(|e| !edit.muted.contains(e)).collect();
    let best_first = |mut experts: Vec<usize>| {
        experts.sort_by(|&a, &b| selection[b].partial_cmp(&selection[a]).expect("a router score is NaN"));
        experts
    };
    let (forced, others): (Vec<usize>, Vec<usize>) = present.iter().partition(|e| edit.forced.contains(e));

    let mut kept: Vec<usize> = (0..params.groups).collect();
    let size = scores.len() / params.groups;
    if params.limits_groups() {
        let counted = if params.scoring == Scoring::Softmax { 1 } else { 2 };
        let group_score = |group: usize| {
            let members = best_first(present.iter().copied().filter(|e| e / size == group).collect());
            if members.is_empty() {
                f64::NEG_INFINITY
            } else {
                members.iter().take(counted).map(|&e| selection[e]).sum()
            }
        };
        kept = top_k(&kept.iter().map(|&group| group_score(group)).collect::<Vec<_>>(), params.topk_group);
    }
    let others = others.into_iter().filter(|e| !params.limits_groups() || kept.contains(&(e / size))).collect();
    let mut ids = [best_first(forced), best_first(others)].concat();
    ids.truncate(params.top_k);
    let mut weights = weights(&scores, &ids, params);
    for (weight, e) in weights.iter_mut().zip(&ids) {
        *weight *= edit.scales.get(e).copied().unwrap_or(1.0);
    }
    ids.resize(params.top_k, ids.first().copied().unwrap_or(0));
    weights.resize(params.top_k, 0.0);
    Route { ids, weights }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(groups: usize, topk_group: usize) -> RouterParams {
        let (scoring, method) = (Scoring::Sigmoid, TopkMethod::NoauxTc);
        RouterParams { scoring, method, groups, topk_group, top_k: 2, norm_topk_prob: true, scale: 2.0 }
    }

    #[test]
    fn an_empty_edit_changes_nothing() {
        let logits = [0.3, -1.0, 2.0, 0.1, 0.7, 0.9];
        for params in [params(1, 1), params(3, 1), params(2, 1)] {
            assert_eq!(route_edited(&logits, None, &params, &RouterEdit::default()), route(&logits, None, &params));
        }
    }

    #[test]
    fn edits_do_what_they_say() {
        let logits = [3.0, 2.0, 1.0, 0.5, -1.0, -2.0];
        let sigmoid = |e: usize| ops::sigmoid(logits[e]);
        let edited = |params, edit| route_edited(&logits, None, &params, &edit);
        // The first group without its best is worse than the second.
        let muted = edited(params(3, 1), RouterEdit { muted: vec![0], ..RouterEdit::default() });
        assert_eq!(muted.ids, [2, 3]);
        // Nobody is left beside expert 4 in the only group that has any.
        let alone = edited(params(3, 1), RouterEdit { muted: vec![0, 1, 2, 3, 5], ..RouterEdit::default() });
        assert_eq!(alone.ids, [4, 4]);
        assert!((alone.weights[0] - 2.0).abs() < 1e-12 && alone.weights[1] == 0.0);
        // From a group that does not stay; weights are those of the scores.
        let forced = edited(params(3, 1), RouterEdit { forced: vec![4], ..RouterEdit::default() });
        assert_eq!(forced.ids, [4, 0]);
        assert!((forced.weights[0] - 2.0 * sigmoid(4) / (sigmoid(4) + sigmoid(0))).abs() < 1e-12);
        let edit = RouterEdit { offsets: [(5, 5.0)].into(), scales: [(5, -0.5)].into(), ..RouterEdit::default() };
        let moved = edited(params(1, 1), edit);
        assert_eq!(moved.ids, [5, 0]);
        assert!((moved.weights[0] + sigmoid(5) / (sigmoid(5) + sigmoid(0))).abs() < 1e-12);
    }

    #[test]
    fn ties_go_to_the_lowest_index() {
        assert_eq!(top_k(&[1.0, 2.0, 2.0, 0.0, -0.0, 2.0], 5), [1, 2, 5, 0, 3]);
    }

    #[test]
    fn softmax_weights_are_never_renormalised() {
        let params = RouterParams {
            scoring: Scoring::Softmax,
            method: TopkMethod::Greedy,
            groups: 1,
            topk_group: 1,
            top_k: 1,
            norm_topk_prob: true,
            scale: 3.0,
        };
        let route = route(&[0.0, 0.0], None, &params);
        assert_eq!((route.ids, route.weights), (vec![0], vec![1.5]));
    }
}
