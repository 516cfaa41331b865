//! Where replicas of busy experts go when a layer's experts are spread over GPUs: the algorithm of DeepSeek's EPLB.
//!
//! Three greedy steps. Groups of experts are packed onto nodes, so that a token's experts are on few nodes. On each node
//! the expert whose replicas have most to do gets one replica more until all slots are taken. The replicas are packed onto
//! the node's GPUs. If the groups cannot be shared out evenly over the nodes, all experts form one group on one node.

use thiserror::Error;

/// GPUs and what they hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cluster {
    /// All GPUs, the same number on each node.
    pub gpus: usize,
    /// Nodes (machines).
    pub nodes: usize,
    /// Groups of consecutive experts that the router limits a token to; 1 if it knows none.
    pub groups: usize,
    /// Slots of all GPUs together: experts and their replicas.
    pub replicas: usize,
}

/// Experts and GPUs that do not fit together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum EplbError {
    /// No experts or GPUs or nodes.
    #[error("{experts} experts on {gpus} GPUs of {nodes} nodes: expected at least one of each")]
    Empty {
        /// Experts found.
        experts: usize,
        /// GPUs found.
        gpus: usize,
        /// Nodes found.
        nodes: usize,
    },
    /// Some expert would have no slot.
    #[error("{replicas} slots for {experts} experts: expected at least one each")]
    TooFewSlots {
        /// Slots found.
        replicas: usize,
        /// Experts that need one.
        experts: usize,
    },
    /// Two numbers of which the first must be a multiple of the second.
    #[error("{count} {what} cannot be shared out evenly over {over} {places}")]
    Uneven {
        /// What is to be shared out.
        what: &'static str,
        /// How many there are.
        count: usize,
        /// Over what.
        places: &'static str,
        /// How many of these there are.
        over: usize,
    },
}

/// Which expert each slot of a layer holds. Slots `[g · per_gpu .. (g + 1) · per_gpu]` are GPU g's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// `[replicas]`, the expert in each slot.
    pub phy2log: Vec<u32>,
    /// `[replicas]`, which of the expert's replicas it is, from 0.
    pub rank: Vec<u32>,
    /// `[experts]`, replicas of each expert.
    pub counts: Vec<u32>,
}

impl Placement {
    /// `[experts, most replicas of any]`: the slots of each expert by rank, padded with −1.
    pub fn log2phy(&self) -> Vec<Vec<i64>> {
        let most = self.counts.iter().copied().max().unwrap_or(0) as usize;
        let mut slots = vec![vec![-1; most]; self.counts.len()];
        for (slot, (&expert, &rank)) in self.phy2log.iter().zip(&self.rank).enumerate() {
            slots[expert as usize][rank as usize] = slot as i64;
        }
        slots
    }

    /// Load of each slot if an expert's replicas share its load `[experts]` evenly.
    pub fn slot_loads(&self, loads: &[f64]) -> Vec<f64> {
        let share = |&expert: &u32| loads[expert as usize] / f64::from(self.counts[expert as usize]);
        self.phy2log.iter().map(share).collect()
    }

    /// Load of each GPU under the same assumption.
    pub fn gpu_loads(&self, loads: &[f64], gpus: usize) -> Vec<f64> {
        self.slot_loads(loads).chunks(self.phy2log.len() / gpus).map(|slots| slots.iter().sum()).collect()
    }
}

/// Places a layer's experts, whose loads are `[experts]`.
pub fn rebalance(loads: &[f64], cluster: &Cluster) -> Result<Placement, EplbError> {
    let Cluster { gpus, nodes, groups, replicas } = check(loads.len(), cluster)?;
    let per_group = loads.len() / groups;
    let by_group: Vec<f64> = loads.chunks(per_group).map(|group| group.iter().sum()).collect();
    let mut placement = Placement { phy2log: Vec::new(), rank: Vec::new(), counts: vec![0; loads.len()] };
    for groups in pack(&by_group, nodes) {
        let experts: Vec<usize> = groups.iter().flat_map(|group| group * per_group..(group + 1) * per_group).collect();
        let counts = replicate(&experts, loads, replicas / nodes);
        for (expert, slots) in experts.iter().zip(&counts.by_expert) {
            placement.counts[*expert] = *slots;
        }
        let share = |&(expert, _): &(usize, u32)| loads[expert] / f64::from(placement.counts[expert]);
        let shares: Vec<f64> = counts.slots.iter().map(share).collect();
        for slot in pack(&shares, gpus / nodes).into_iter().flatten() {
            let (expert, rank) = counts.slots[slot];
            placement.phy2log.push(expert as u32);
            placement.rank.push(rank);
        }
    }
    Ok(placement)
}

/// The cluster with the groups and nodes that are used, if everything can be shared out.
fn check(experts: usize, cluster: &Cluster) -> Result<Cluster, EplbError> {
    let Cluster { gpus, nodes, groups, replicas } = *cluster;
    if experts == 0 || gpus == 0 || nodes == 0 {
        return Err(EplbError::Empty { experts, gpus, nodes });
    }
    if replicas < experts {
        return Err(EplbError::TooFewSlots { replicas, experts });
    }
    let even = |what, count: usize, places, over: usize| {
        if count.is_multiple_of(over) { Ok(()) } else { Err(EplbError::Uneven { what, count, places, over }) }
    };
    even("slots", replicas, "GPUs", gpus)?;
    even("GPUs", gpus, "nodes", nodes)?;
    let groups = groups.max(1);
    if groups.is_multiple_of(nodes) {
        even("experts", experts, "groups", groups)?;
        Ok(Cluster { groups, ..*cluster })
    } else {
        Ok(Cluster { groups: 1, nodes: 1, ..*cluster })
    }
}

/// Replicas of a node's experts.
struct Replicas {
    /// Expert and rank of each slot, in the order in which they were made.
    slots: Vec<(usize, u32)>,
    /// How many each expert of the node has.
    by_expert: Vec<u32>,
}

/// One slot for each expert; each further one goes to the expert whose replicas have most to do.
fn replicate(experts: &[usize], loads: &[f64], slots: usize) -> Replicas {
    let mut made: Vec<(usize, u32)> = experts.iter().map(|&expert| (expert, 0)).collect();
    let mut by_expert = vec![1u32; experts.len()];
    for _ in experts.len()..slots {
        let share = |i: usize| loads[experts[i]] / f64::from(by_expert[i]);
        let mut busiest = 0;
        for i in 1..experts.len() {
            if share(i) > share(busiest) {
                busiest = i;
            }
        }
        made.push((experts[busiest], by_expert[busiest]));
        by_expert[busiest] += 1;
    }
    Replicas { slots: made, by_expert }
}

/// Items of each pack: the heaviest item goes to the lightest pack that has room, and so on. All packs get the same
/// number of items, so that with as many packs as items each item is its own pack.
fn pack(weights: &[f64], packs: usize) -> Vec<Vec<usize>> {
    let room = weights.len() / packs;
    if room == 1 {
        return (0..packs).map(|item| vec![item]).collect();
    }
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]));
    let mut items = vec![Vec::with_capacity(room); packs];
    let mut sums = vec![0.0; packs];
    for item in order {
        let with_room = (0..packs).filter(|&pack| items[pack].len() < room);
        let lightest = with_room.min_by(|&a, &b| f64::total_cmp(&sums[a], &sums[b])).expect("room for every item");
        items[lightest].push(item);
        sums[lightest] += weights[item];
    }
    items
}

#[cfg(test)]
mod tests {
    use super::*;

    fn largest(loads: &[f64]) -> f64 {
        loads.iter().copied().fold(0.0, f64::max)
    }

    fn check_invariants(placement: &Placement, experts: usize, cluster: &Cluster) {
        assert_eq!(placement.phy2log.len(), cluster.replicas);
        assert_eq!(placement.counts.iter().sum::<u32>() as usize, cluster.replicas);
        assert!(placement.counts.iter().all(|&count| count > 0) && placement.counts.len() == experts);
        let log2phy = placement.log2phy();
        for (expert, slots) in log2phy.iter().enumerate() {
            let held: Vec<i64> = slots.iter().copied().filter(|slot| *slot >= 0).collect();
            assert_eq!(held.len() as u32, placement.counts[expert]);
            assert!(held.iter().all(|&slot| placement.phy2log[slot as usize] as usize == expert));
            assert!(slots[held.len()..].iter().all(|&slot| slot == -1), "padding comes last");
        }
    }

    #[test]
    fn the_published_example_comes_out() {
        // README of github.com/deepseek-ai/EPLB.
        let layers: [[u32; 12]; 2] = [
            [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
            [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
        ];
        let expected: [[u32; 16]; 2] =
            [[5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]];
        let cluster = Cluster { gpus: 8, nodes: 2, groups: 4, replicas: 16 };
        for (loads, expected) in layers.iter().zip(expected) {
            let loads: Vec<f64> = loads.iter().map(|&load| f64::from(load)).collect();
            let placement = rebalance(&loads, &cluster).unwrap();
            assert_eq!(placement.phy2log, expected);
            check_invariants(&placement, 12, &cluster);
            // Replicas of an expert stay on the node of its group.
            for group in 0..4u32 {
                let nodes = (0..16).filter(|&slot| placement.phy2log[slot] / 3 == group).map(|slot| slot / 8);
                assert_eq!(nodes.clone().min(), nodes.max());
            }
        }
    }

    #[test]
    fn everything_has_its_place_whatever_the_shape() {
        let shapes = [(8, 8, 1, 1, 8), (8, 4, 2, 4, 16), (32, 8, 1, 4, 40), (256, 32, 4, 8, 288), (12, 3, 3, 4, 15)];
        for (experts, gpus, nodes, groups, replicas) in shapes {
            for seed in 0..4u64 {
                let loads: Vec<f64> = (0..experts as u64)
                    .map(|i| ((i * i * 31 + seed * 17) % 101 * u64::from(seed > 0)) as f64)
                    .collect();
                let cluster = Cluster { gpus, nodes, groups, replicas };
                let placement = rebalance(&loads, &cluster).unwrap();
                check_invariants(&placement, experts, &cluster);
                let (before, after) = (loads.iter().sum::<f64>(), placement.gpu_loads(&loads, gpus));
                assert!((after.iter().sum::<f64>() - before).abs() < 1e-6 && after.len() == gpus);
            }
        }
    }

    /// The least possible load of the busiest GPU: tries every way to fill the slots.
    fn optimum(loads: &[f64], gpus: usize, per_gpu: usize) -> f64 {
        fn fill(loads: &[f64], per_gpu: usize, slots: &mut Vec<usize>, total: usize, best: &mut f64) {
            if slots.len() == total {
                let mut counts = vec![0.0; loads.len()];
                for &expert in slots.iter() {
                    counts[expert] += 1.0;
                }
                if counts.iter().all(|&count| count > 0.0) {
                    let sum = |gpu: &[usize]| gpu.iter().map(|&expert| loads[expert] / counts[expert]).sum::<f64>();
                    *best = best.min(slots.chunks(per_gpu).map(sum).fold(0.0, f64::max));
                }
                return;
            }
            for expert in 0..loads.len() {
                slots.push(expert);
                fill(loads, per_gpu, slots, total, best);
                slots.pop();
            }
        }
        let mut best = f64::INFINITY;
        fill(loads, per_gpu, &mut Vec::new(), gpus * per_gpu, &mut best);
        best
    }

    #[test]
    fn it_is_never_better_than_possible_and_close_to_it() {
        for seed in 1..8u64 {
            for (experts, gpus, per_gpu) in [(3u64, 2, 2), (4, 2, 3), (4, 3, 2), (5, 3, 2)] {
                let loads: Vec<f64> = (0..experts).map(|i| ((i + 2) * seed * 37 % 53 + 1) as f64).collect();
                let cluster = Cluster { gpus, nodes: 1, groups: 1, replicas: gpus * per_gpu };
                let found = largest(&rebalance(&loads, &cluster).unwrap().gpu_loads(&loads, gpus));
                let least = optimum(&loads, gpus, per_gpu);
                assert!(found >= least - 1e-9 && found <= least * 1.5, "{loads:?}: {found}, {least}");
            }
        }
    }

    #[test]
    fn groups_that_do_not_fit_the_nodes_are_ignored() {
        let loads: Vec<f64> = (0..12).map(|i| f64::from(i * i % 29)).collect();
        let odd = rebalance(&loads, &Cluster { gpus: 6, nodes: 3, groups: 4, replicas: 18 });
        let global = rebalance(&loads, &Cluster { gpus: 6, nodes: 1, groups: 1, replicas: 18 });
        assert_eq!(odd, global);
        assert!(global.is_ok());
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let cluster = Cluster { gpus: 4, nodes: 2, groups: 2, replicas: 8 };
        let wrong = [
            (0, cluster, "0 experts on 4 GPUs of 2 nodes: expected at least one of each"),
            (8, Cluster { gpus: 0, ..cluster }, "8 experts on 0 GPUs of 2 nodes: expected at least one of each"),
            (9, cluster, "8 slots for 9 experts: expected at least one each"),
            (8, Cluster { replicas: 9, ..cluster }, "9 slots cannot be shared out evenly over 4 GPUs"),
            (6, Cluster { nodes: 3, ..cluster }, "4 GPUs cannot be shared out evenly over 3 nodes"),
            (7, cluster, "7 experts cannot be shared out evenly over 2 groups"),
        ];
        for (experts, cluster, message) in wrong {
            assert_eq!(rebalance(&vec![1.0; experts], &cluster).unwrap_err().to_string(), message);
        }
    }
}
