//! What the balance view shows, computed from the loads of all layers.

use std::sync::Arc;

use crate::analysis::balance::{Balance, balance, balancedness, by_group, contiguous};
use crate::analysis::eplb::{Cluster, EplbError, Placement, rebalance};
use crate::heat::Grid;
use crate::numbers::Table;
use crate::store::{Load, Store};
use crate::subject::Subject;

/// What counts as load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Measure {
    /// Tokens that were given to an expert.
    #[default]
    Tokens,
    /// Sum of the weights with which they were.
    Weights,
}

impl Measure {
    pub(super) fn unit(self) -> &'static str {
        match self {
            Measure::Tokens => "tokens",
            Measure::Weights => "summed weight",
        }
    }
}

/// A layer's loads and what follows from them.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    pub(super) number: u32,
    /// `[experts]`, tokens.
    pub(super) tokens: Vec<u64>,
    /// `[experts]`, by the chosen measure.
    pub(super) loads: Vec<f64>,
    /// Of `loads`.
    pub(super) balance: Option<Balance>,
    /// `[groups]`, of `loads`.
    pub(super) groups: Vec<f64>,
    /// `[gpus]`, tokens if consecutive experts are shared out without replicas.
    pub(super) before: Vec<f64>,
    /// With replicas, from tokens.
    pub(super) placed: Result<Placed, EplbError>,
}

/// Where a layer's experts go.
#[derive(Clone, Debug)]
pub(super) struct Placed {
    pub(super) placement: Placement,
    /// `[replicas]`, tokens of each slot.
    pub(super) slots: Vec<f64>,
    /// `[gpus]`, tokens.
    pub(super) gpus: Vec<f64>,
}

impl Layer {
    /// Tokens that the layer saw.
    pub(super) fn seen(&self, top_k: u32) -> u64 {
        self.tokens.iter().sum::<u64>() / u64::from(top_k.max(1))
    }

    pub(super) fn balancedness_before(&self) -> f64 {
        balancedness(&self.before)
    }

    pub(super) fn balancedness_after(&self) -> Option<f64> {
        self.placed.as_ref().ok().map(|placed| balancedness(&placed.gpus))
    }
}

/// All layers.
#[derive(Clone, Debug)]
pub(super) struct Report {
    pub(super) layers: Vec<Layer>,
    /// `[all layers of the model, experts]`, load over the layer's mean; absent where nothing was recorded.
    pub(super) map: Grid,
}

impl Report {
    pub(super) fn layer(&self, number: u32) -> Option<&Layer> {
        self.layers.iter().find(|layer| layer.number == number)
    }
}

/// The loads that there are, by layer.
pub(super) fn loads(store: &Store, subject: &Subject) -> Vec<(u32, Load)> {
    let load = |&layer: &u32| store.load(layer).map(|load| (layer, load.clone()));
    subject.model.moe_layers.iter().filter_map(load).collect()
}

/// Everything that the view shows.
pub(super) fn report(loads: &[(u32, Load)], subject: &Subject, measure: Measure, cluster: &Cluster) -> Report {
    let groups = subject.model.n_group as usize;
    let layer = |(layer, load): &(u32, Load)| {
        let tokens: Vec<f64> = load.tokens.iter().map(|&count| count as f64).collect();
        let placed = rebalance(&tokens, cluster).map(|placement| Placed {
            slots: placement.slot_loads(&tokens),
            gpus: placement.gpu_loads(&tokens, cluster.gpus),
            placement,
        });
        let before = contiguous(&tokens, cluster.gpus);
        let loads = if measure == Measure::Tokens { tokens } else { load.weights.clone() };
        Layer {
            number: *layer,
            tokens: load.tokens.clone(),
            balance: balance(&loads),
            groups: by_group(&loads, groups),
            before,
            placed,
            loads,
        }
    };
    let layers: Vec<Layer> = loads.iter().map(layer).collect();
    let (rows, experts) = (subject.model.layers as usize, subject.model.experts as usize);
    let mut cells = vec![f32::NAN; rows * experts];
    for layer in &layers {
        let mean = layer.loads.iter().sum::<f64>() / experts as f64;
        if let Some(row) = cells.get_mut(layer.number as usize * experts..).filter(|_| mean > 0.0) {
            row.iter_mut().zip(&layer.loads).for_each(|(cell, load)| *cell = (load / mean) as f32);
        }
    }
    Report { layers, map: Grid { range: range(&cells), ..Grid::from_zero(rows, experts, cells) } }
}

/// From 0 to four times the mean, or to the largest cell if none is so large: one very hot expert must not make all
/// others look the same.
fn range(cells: &[f32]) -> (f32, f32) {
    let most = cells.iter().copied().filter(|cell| cell.is_finite()).fold(1.0f32, f32::max);
    (0.0, most.min(4.0))
}

/// All numbers of a report, for files.
pub(super) fn tables(report: &Report, subject: &Subject, measure: Measure, cluster: &Cluster) -> Vec<Table> {
    let (count, experts) = (report.layers.len(), subject.model.experts as usize);
    let by_layer = [("layer", count)];
    let by_expert = [("layer", count), ("expert", experts)];
    let integers = |of: &dyn Fn(&Layer) -> i64| report.layers.iter().map(of).collect::<Vec<i64>>();
    let floats = |of: &dyn Fn(&Layer) -> f64| report.layers.iter().map(|layer| of(layer) as f32).collect::<Vec<f32>>();
    let balance = |of: &dyn Fn(&Balance) -> f64| floats(&|layer| layer.balance.as_ref().map_or(f64::NAN, of));
    let tokens = || report.layers.iter().flat_map(|l| l.tokens.iter().map(|&n| n as i64)).collect::<Vec<i64>>();
    let unit = measure.unit().replace(' ', "_");
    let loads = report.layers.iter().flat_map(|l| l.loads.iter().map(|&load| load as f32)).collect();
    let groups = report.layers.first().map_or(0, |layer| layer.groups.len());
    let by_group = report.layers.iter().flat_map(|l| l.groups.iter().map(|&load| load as f32)).collect();
    let top_k = subject.model.num_experts_per_tok;
    let mut tables = vec![
        Table::integers("balance.layers", &by_layer, integers(&|layer| i64::from(layer.number))),
        Table::integers("balance.seen_tokens", &by_layer, integers(&|layer| layer.seen(top_k) as i64)),
        Table::floats(format!("balance.load.{unit}"), &by_expert, loads),
        Table::floats(format!("balance.group_load.{unit}"), &[("layer", count), ("group", groups)], by_group),
        Table::floats("balance.entropy_bits", &by_layer, balance(&|b| b.entropy_bits)),
        Table::floats("balance.entropy_share", &by_layer, balance(&|b| b.entropy_share)),
        Table::floats("balance.gini", &by_layer, balance(&|b| b.gini)),
        Table::floats("balance.top_tenth_share", &by_layer, balance(&|b| b.top_share)),
        Table::floats("balance.never_used", &by_layer, balance(&|b| b.dead.len() as f64)),
        Table::floats("balance.hot", &by_layer, balance(&|b| b.hot.len() as f64)),
        Table::floats("balance.balancedness", &by_layer, balance(&|b| b.balancedness)),
        Table::integers("eplb.weight", &by_expert, tokens()),
    ];
    let by_gpu = [("layer", count), ("gpu", cluster.gpus)];
    let gpus = |of: &dyn Fn(&Layer) -> Vec<f64>| -> Vec<f32> {
        report.layers.iter().flat_map(of).map(|load| load as f32).collect()
    };
    tables.push(Table::floats("eplb.gpu_load_contiguous", &by_gpu, gpus(&|layer| layer.before.clone())));
    tables.push(Table::floats("eplb.balancedness_contiguous", &by_layer, floats(&Layer::balancedness_before)));
    let placed: Option<Vec<&Placed>> = report.layers.iter().map(|layer| layer.placed.as_ref().ok()).collect();
    let Some(placed) = placed else { return tables };
    let most = placed.iter().flat_map(|p| &p.placement.counts).copied().max().unwrap_or(0) as usize;
    let slots = placed.iter().flat_map(|p| p.placement.phy2log.iter().map(|&expert| i64::from(expert))).collect();
    let counts = placed.iter().flat_map(|p| p.placement.counts.iter().map(|&count| i64::from(count))).collect();
    let mut log2phy = Vec::with_capacity(count * experts * most);
    for row in placed.iter().flat_map(|p| p.placement.log2phy()) {
        let padding = most - row.len();
        log2phy.extend(row);
        log2phy.extend(std::iter::repeat_n(-1, padding));
    }
    let by_replica = [("layer", count), ("expert", experts), ("replica", most)];
    let after = gpus(&|layer| layer.placed.as_ref().map(|p| p.gpus.clone()).unwrap_or_default());
    tables.extend([
        Table::integers("eplb.phy2log", &[("layer", count), ("slot", cluster.replicas)], slots),
        Table::integers("eplb.log2phy", &by_replica, log2phy),
        Table::integers("eplb.logical_count", &by_expert, counts),
        Table::floats("eplb.gpu_load", &by_gpu, after),
        Table::floats("eplb.balancedness", &by_layer, floats(&|l| l.balancedness_after().unwrap_or(f64::NAN))),
    ]);
    tables
}

/// Loads as the view holds them between frames, so that a job can share them.
#[derive(Default)]
pub(super) struct Snapshot {
    pub(super) of: Option<(bool, u64)>,
    pub(super) loads: Arc<Vec<(u32, Load)>>,
}

impl Snapshot {
    /// Takes the loads anew if enough came since: while texts are being written, in steps of a few per cent.
    pub(super) fn refresh(&mut self, store: &Store, subject: &Subject) {
        let running = store.sequences().iter().any(|sequence| sequence.running);
        let tokens: u64 = store.sequences().iter().map(|sequence| sequence.tokens.len() as u64).sum();
        let now = Some((running, if running { crate::jobs::coarse(tokens) } else { store.version() }));
        if self.of != now {
            self.loads = Arc::new(loads(store, subject));
            self.of = now;
        }
    }
}
