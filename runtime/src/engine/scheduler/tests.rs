//! Each rule alone. Pages hold 64 tokens.

use super::model::{Model, Text};
use super::*;

const LIMITS: Limits = Limits { tokens: 64, rows: 8, running: 8, min_chunk: 8, lead: 0 };

struct Bench {
    scheduler: Scheduler,
    pool: Model,
}

impl Bench {
    fn new(limits: Limits, pages: u32) -> Self {
        Self { scheduler: Scheduler::new(limits), pool: Model::new(pages, limits.running) }
    }

    fn submit(&mut self, id: u64, priority: i32, prompt: usize, max_new: usize) {
        assert!(self.scheduler.submit(Request { id, priority, prompt, max_new }));
    }

    fn plan(&mut self) -> Plan {
        let plan = self.scheduler.plan(&mut self.pool, 1);
        self.pool.check();
        plan
    }

    /// Plans and runs; each sampling item draws one token.
    fn tick(&mut self) -> Plan {
        let plan = self.plan();
        for item in &plan.items {
            self.scheduler.ran(item, usize::from(item.samples));
        }
        plan
    }

    fn end(&mut self, id: u64) {
        if self.scheduler.remove(id).expect("it is known") != Phase::Waiting {
            self.pool.release(id);
        }
    }

    fn phases(&self, ids: impl IntoIterator<Item = u64>) -> Vec<Option<Phase>> {
        ids.into_iter().map(|id| self.scheduler.phase(id)).collect()
    }
}

/// Id, tokens and drafts of each item.
fn items(plan: &Plan) -> Vec<(u64, usize, usize)> {
    plan.items.iter().map(|item| (item.id, item.tokens, item.drafts)).collect()
}

const WAITING: Option<Phase> = Some(Phase::Waiting);
const PREFILL: Option<Phase> = Some(Phase::Prefill);
const DECODE: Option<Phase> = Some(Phase::Decode);

#[test]
fn a_prompt_runs_in_chunks_and_then_draws_one_token_at_a_time() {
    let mut bench = Bench::new(LIMITS, 10);
    bench.submit(7, 0, 150, 3);
    let chunk = |tokens, samples| [Item { id: 7, tokens, drafts: 0, samples }];
    assert_eq!(bench.tick().items, chunk(64, false));
    assert_eq!(bench.tick().items, chunk(64, false));
    assert_eq!(bench.phases([7]), [PREFILL]);
    assert_eq!(bench.tick().items, chunk(22, true));
    assert_eq!(bench.phases([7]), [DECODE]);
    assert_eq!(bench.tick().items, chunk(1, true));
    bench.end(7);
    assert_eq!(bench.tick(), Plan { burst: 1, ..Plan::default() });
    assert!(bench.scheduler.idle());
}

#[test]
fn what_a_failed_pass_should_have_run_is_planned_again() {
    let mut bench = Bench::new(LIMITS, 10);
    bench.submit(1, 0, 100, 5);
    bench.submit(2, 0, 3, 5);
    bench.tick();
    let plan = bench.plan();
    assert_eq!(items(&plan), [(2, 1, 0), (1, 39, 0)]);
    assert_eq!(bench.plan(), plan);
}

#[test]
fn cached_tokens_of_the_beginning_are_not_run() {
    let mut bench = Bench::new(LIMITS, 10);
    for id in [1, 2] {
        bench.pool.texts.insert(id, Text { family: 0, shared: 130 });
    }
    bench.submit(1, 0, 130, 5);
    while bench.scheduler.phase(1) != DECODE {
        bench.tick();
    }
    bench.end(1);
    bench.submit(2, 0, 140, 5);
    assert_eq!(items(&bench.tick()), [(2, 12, 0)]);
}

#[test]
fn empty_prompts_and_ids_in_use_are_not_taken() {
    let mut bench = Bench::new(LIMITS, 10);
    let request = Request { id: 1, priority: 0, prompt: 0, max_new: 1 };
    assert!(!bench.scheduler.submit(request));
    assert!(bench.scheduler.submit(Request { prompt: 1, ..request }));
    assert!(!bench.scheduler.submit(Request { prompt: 2, ..request }));
    bench.end(1);
    assert!(bench.scheduler.submit(Request { prompt: 1, ..request }));
}

#[test]
fn a_short_prompt_overtakes_a_long_one_which_still_gets_half() {
    let mut bench = Bench::new(LIMITS, 100);
    bench.submit(1, 0, 2000, 5);
    assert_eq!(items(&bench.tick()), [(1, 64, 0)]);
    bench.submit(2, 0, 50, 5);
    // The long one has waited longest for its turn.
    assert_eq!(items(&bench.tick()), [(1, 32, 0), (2, 32, 0)]);
    assert_eq!(items(&bench.tick()), [(1, 46, 0), (2, 18, 0)]);
    assert_eq!(items(&bench.tick()), [(2, 1, 0), (1, 63, 0)]);
}

#[test]
fn among_prompts_higher_priority_comes_before_fewer_tokens() {
    let mut bench = Bench::new(LIMITS, 100);
    for (id, priority, prompt) in [(1, 0, 500), (2, 0, 100), (3, 1, 300)] {
        bench.submit(id, priority, prompt, 5);
    }
    // A turn of 3, which is first in rank, and the rest to it as well.
    assert_eq!(items(&bench.tick()), [(3, 64, 0)]);
    assert_eq!(items(&bench.tick()), [(3, 32, 0), (1, 32, 0)]);
    assert_eq!(items(&bench.tick()), [(3, 32, 0), (2, 32, 0)]);
}

#[test]
fn chunks_too_small_to_be_worth_it_are_left_out_unless_they_end_a_prompt() {
    let mut bench = Bench::new(Limits { tokens: 20, min_chunk: 12, ..LIMITS }, 100);
    bench.submit(1, 0, 100, 5);
    bench.submit(2, 0, 90, 5);
    // 12 to 1, whose turn it is; what is left is too little for 2, and goes to 1.
    assert_eq!(items(&bench.tick()), [(1, 20, 0)]);
    bench.submit(3, 0, 7, 5);
    assert_eq!(items(&bench.tick()), [(2, 13, 0), (3, 7, 0)]);
}

#[test]
fn every_prompt_gets_a_turn_within_as_many_ticks_as_there_are_prompts() {
    let mut bench = Bench::new(Limits { tokens: 16, running: 5, ..LIMITS }, 1000);
    bench.submit(0, 0, 5000, 5);
    let mut id = 0;
    let mut last = 0;
    for tick in 1..=400 {
        // Short prompts without end, which would always be before it.
        while bench.scheduler.counts().waiting + bench.scheduler.counts().prefill < 6 {
            id += 1;
            bench.submit(id, 0, 40, 5);
        }
        let plan = bench.tick();
        for item in plan.items {
            if item.id == 0 {
                assert!(item.tokens >= 8, "a turn is worth half of the tokens");
                last = tick;
            } else if item.samples {
                bench.end(item.id);
            }
        }
        assert!(tick - last < 5, "no turn for {} ticks", tick - last);
    }
}

/// Sequences 1 … `count`, all of them decoding.
fn decoding(limits: Limits, pages: u32, count: u64) -> Bench {
    let mut bench = Bench::new(limits, pages);
    for id in 1..=count {
        bench.submit(id, 0, 10, 1000);
    }
    for _ in 0..20 * count {
        if bench.scheduler.counts().decode < count as usize {
            bench.tick();
        }
    }
    assert_eq!(bench.scheduler.counts().decode, count as usize);
    bench
}

#[test]
fn decoding_sequences_come_before_prompts_and_prompts_get_the_rest() {
    let mut bench = decoding(LIMITS, 100, 5);
    bench.submit(9, 0, 500, 5);
    assert_eq!(items(&bench.tick()), [(1, 1, 0), (2, 1, 0), (3, 1, 0), (4, 1, 0), (5, 1, 0), (9, 59, 0)]);
}

#[test]
fn drafts_are_cut_evenly_to_what_fits_rows_and_tokens() {
    let mut bench = decoding(LIMITS, 100, 3);
    for (id, drafts) in [(1, 1), (2, 9), (3, 4)] {
        bench.scheduler.set_drafts(id, drafts);
    }
    // 8 rows: three, and five for drafts.
    assert_eq!(items(&bench.tick()), [(1, 1, 1), (2, 1, 2), (3, 1, 2)]);
    // 11 tokens, 2 of them run again for each: no more than one draft each.
    let mut bench = decoding(Limits { tokens: 12, lead: 2, ..LIMITS }, 100, 3);
    for id in 1..=3 {
        bench.scheduler.set_drafts(id, 2);
    }
    assert_eq!(items(&bench.tick()), [(1, 1, 1), (2, 1, 1), (3, 1, 1)]);
    bench.end(2);
    assert_eq!(items(&bench.tick()), [(1, 1, 2), (3, 1, 2)]);
}

#[test]
fn drafts_end_where_the_last_token_may_be_drawn() {
    let mut bench = Bench::new(LIMITS, 10);
    bench.submit(1, 0, 10, 4);
    bench.scheduler.set_drafts(1, 7);
    bench.tick();
    assert_eq!(items(&bench.tick()), [(1, 1, 2)]);
    assert_eq!(items(&bench.tick()), [(1, 1, 1)]);
    assert_eq!(items(&bench.tick()), [(1, 1, 0)]);
}

#[test]
fn drafts_leave_prompts_half_of_the_tokens_and_a_quarter_of_the_rows() {
    let mut bench = decoding(LIMITS, 100, 2);
    for id in [1, 2] {
        bench.scheduler.set_drafts(id, 3);
    }
    assert_eq!(items(&bench.tick()), [(1, 1, 3), (2, 1, 3)]);
    for id in 3..=5 {
        bench.submit(id, 0, 100, 5);
    }
    // The prompts are new; from now on they are counted with.
    bench.tick();
    assert_eq!(items(&bench.tick()), [(1, 1, 2), (2, 1, 2), (3, 29, 0), (4, 29, 0)]);
    let mut bench = decoding(Limits { tokens: 12, rows: 16, ..LIMITS }, 100, 2);
    for id in [1, 2] {
        bench.scheduler.set_drafts(id, 4);
    }
    assert_eq!(items(&bench.tick()), [(1, 1, 4), (2, 1, 4)]);
    bench.submit(3, 0, 100, 5);
    bench.tick();
    assert_eq!(items(&bench.tick()), [(1, 1, 2), (2, 1, 2), (3, 6, 0)]);
}

#[test]
fn more_decoding_sequences_than_rows_take_turns() {
    let mut bench = decoding(Limits { rows: 3, ..LIMITS }, 100, 7);
    for id in 1..=7 {
        bench.scheduler.set_drafts(id, 2);
    }
    let mut served = [0; 8];
    for _ in 0..70 {
        let plan = bench.tick();
        assert_eq!(plan.items.len(), 3);
        for item in plan.items {
            assert_eq!(item.drafts, 0, "drafts go first");
            served[item.id as usize] += 1;
        }
    }
    assert_eq!(served, [0, 30, 30, 30, 30, 30, 30, 30]);
}

#[test]
fn a_prompt_takes_turns_with_decoding_sequences_that_fill_the_batch() {
    let mut bench = decoding(Limits { rows: 3, ..LIMITS }, 100, 3);
    bench.submit(4, 0, 1000, 5);
    let mut served = [0; 5];
    for _ in 0..12 {
        for item in bench.tick().items {
            served[item.id as usize] += 1;
        }
    }
    assert_eq!(served, [0, 9, 9, 9, 9]);
}

#[test]
fn higher_priority_is_admitted_first_then_earlier_arrival() {
    let mut bench = Bench::new(Limits { running: 1, ..LIMITS }, 100);
    for (id, priority) in [(1, 0), (2, -1), (3, 0), (4, 1)] {
        bench.submit(id, priority, 10, 5);
    }
    let mut order = Vec::new();
    while !bench.scheduler.idle() {
        let id = bench.tick().items[0].id;
        order.push(id);
        bench.end(id);
    }
    assert_eq!(order, [4, 1, 3, 2]);
}

#[test]
fn waiting_for_256_ticks_weighs_as_much_as_a_level_of_priority() {
    for (late, first) in [(AGEING_TICKS - 1, 9), (AGEING_TICKS, 1)] {
        let mut bench = Bench::new(Limits { running: 1, ..LIMITS }, 100);
        bench.submit(0, 5, 10, 100_000);
        bench.tick();
        bench.submit(1, 0, 10, 5);
        for _ in 0..late {
            bench.tick();
        }
        bench.submit(9, 1, 10, 5);
        bench.end(0);
        assert_eq!(bench.tick().items[0].id, first);
    }
}

#[test]
fn under_more_high_priority_than_can_be_served_a_low_one_is_served_all_the_same() {
    let mut bench = Bench::new(Limits { running: 2, ..LIMITS }, 100);
    let (rate, service, priority) = (3, 10, 2);
    let mut before = 0;
    bench.submit(0, 0, 10, service);
    let mut drawn = HashMap::new();
    for tick in 0..20_000 {
        if tick % rate == 0 {
            // Every 3 ticks another request of 10 ticks, for 2 slots: much too many.
            bench.submit(1 + tick as u64, priority, 10, service);
            before += usize::from(tick < priority as usize * AGEING_TICKS as usize);
        }
        for item in bench.tick().items {
            let count = drawn.entry(item.id).or_insert(0);
            *count += 1;
            if *count == service {
                bench.end(item.id);
                if item.id == 0 {
                    // Those that came within 2 · 256 ticks are before it, and no others.
                    let bound = (before / 2 + 2) * service;
                    assert!(tick >= 2 * AGEING_TICKS as usize && tick < bound, "{tick}, not {bound}");
                    return;
                }
            }
        }
    }
    panic!("it was never served");
}

#[test]
fn a_higher_priority_takes_slot_and_pages_of_the_last_in_rank() {
    let mut bench = decoding(Limits { running: 3, ..LIMITS }, 100, 3);
    bench.submit(9, 1, 10, 5);
    bench.tick();
    assert_eq!(bench.phases([1, 2, 3, 9]), [DECODE, DECODE, WAITING, DECODE]);
    // One of the same priority waits behind the preempted one, which has all its tokens as its prompt now.
    bench.submit(10, 0, 10, 5);
    bench.end(9);
    let drawn = 2;
    assert_eq!(items(&bench.tick()), [(1, 1, 0), (2, 1, 0), (3, 10 + drawn - 1, 0)]);
    assert_eq!(bench.phases([3, 10]), [DECODE, WAITING]);
    assert_eq!(bench.scheduler.counts(), Counts { waiting: 1, prefill: 0, decode: 3, admitted: 5, preempted: 1 });
}

#[test]
fn nothing_is_preempted_for_a_request_that_would_not_fit_even_so() {
    let mut bench = Bench::new(LIMITS, 10);
    bench.submit(1, 5, 400, 100);
    bench.submit(2, 0, 10, 100);
    bench.tick();
    // 7 of the pages are those of the first in rank, for 4 there is no room beside it.
    bench.submit(3, 1, 250, 100);
    bench.tick();
    assert_eq!(bench.phases([1, 2, 3]), [PREFILL, DECODE, WAITING]);
    bench.submit(4, 1, 65, 100);
    bench.tick();
    // Nor does anybody overtake it.
    assert_eq!(bench.phases([1, 2, 3, 4]), [PREFILL, DECODE, WAITING, WAITING]);
    bench.end(1);
    bench.tick();
    assert_eq!(bench.phases([2, 3, 4]), [DECODE, PREFILL, PREFILL]);
}

#[test]
fn admission_leaves_a_page_for_everyone_that_may_need_one() {
    // 1 needs no more than the page that it has, 2 may need another one.
    let mut bench = Bench::new(LIMITS, 5);
    bench.submit(1, 0, 10, 55);
    bench.submit(2, 0, 10, 56);
    bench.tick();
    // Two pages and one to grow: with one for 2, that would be 4 of the 3 that are left.
    bench.submit(3, 0, 100, 100);
    bench.tick();
    assert_eq!(bench.phases([1, 2, 3]), [DECODE, DECODE, WAITING]);
    bench.end(1);
    bench.tick();
    assert_eq!(bench.phases([2, 3]), [DECODE, PREFILL]);
}

/// Three decoding sequences at the end of their first pages, with so many other pages.
fn at_page_ends(pages: u32) -> Bench {
    let mut bench = Bench::new(LIMITS, 3 + pages);
    for id in 1..=3 {
        bench.submit(id, 0, 20, 45);
    }
    for _ in 0..44 {
        bench.tick();
    }
    assert!(bench.scheduler.running.values().all(|one| one.tokens == 64));
    bench
}

#[test]
fn a_sequence_without_pages_preempts_the_last_in_rank() {
    let mut bench = at_page_ends(1);
    assert_eq!(bench.tick().items.len(), 3);
    for one in bench.scheduler.running.values_mut() {
        one.remaining = 100;
    }
    // 1 takes the free page, 2 that of 3.
    assert_eq!(items(&bench.tick()), [(1, 1, 0), (2, 1, 0)]);
    assert_eq!(bench.phases([1, 2, 3]), [DECODE, DECODE, WAITING]);
}

#[test]
fn the_last_in_rank_pauses_and_keeps_its_pages() {
    let mut bench = at_page_ends(2);
    bench.tick();
    for one in bench.scheduler.running.values_mut() {
        one.remaining = 100;
    }
    assert_eq!(items(&bench.tick()), [(1, 1, 0), (2, 1, 0)]);
    assert_eq!(bench.phases([1, 2, 3]), [DECODE; 3]);
    bench.end(1);
    assert_eq!(items(&bench.tick()), [(2, 1, 0), (3, 1, 0)]);
}

#[test]
fn drafts_are_dropped_before_anything_is_preempted() {
    let mut bench = at_page_ends(0);
    for id in 1..=3 {
        bench.scheduler.set_drafts(id, 2);
    }
    bench.scheduler.find(1).unwrap().remaining = 100;
    // The newest token still fits the page, a draft does not.
    assert_eq!(items(&bench.plan()), [(1, 1, 0), (2, 1, 0), (3, 1, 0)]);
}

#[test]
fn a_sequence_that_fills_the_cache_alone_fails() {
    let mut bench = Bench::new(LIMITS, 2);
    bench.submit(1, 0, 100, 1000);
    let mut tokens = 100;
    loop {
        let plan = bench.tick();
        if let [(1, reason)] = plan.failed[..] {
            assert_eq!(reason, Reason::OutOfPages { tokens: 129, needed: 3, total: 2 });
            let text = "129 tokens need 3 pages of the cache, which gives a sequence at most 2";
            assert_eq!(reason.to_string(), text);
            assert!(plan.items.is_empty() && bench.pool.pages.is_empty() && bench.scheduler.idle());
            break;
        }
        tokens += usize::from(plan.items[0].samples);
        assert!(tokens <= 129);
    }
}

#[test]
fn a_prompt_that_fits_no_cache_fails_at_once_and_disturbs_nobody() {
    let mut bench = decoding(LIMITS, 6, 2);
    bench.submit(9, 100, 6 * 64 + 1, 5);
    let plan = bench.tick();
    assert_eq!(plan.failed, [(9, Reason::OutOfPages { tokens: 385, needed: 7, total: 6 })]);
    assert_eq!(items(&plan), [(1, 1, 0), (2, 1, 0)]);
}

#[test]
fn requests_can_be_removed_wherever_they_are() {
    let mut bench = decoding(Limits { running: 3, ..LIMITS }, 100, 2);
    for id in [3, 4] {
        bench.submit(id, 0, 500, 5);
    }
    bench.tick();
    assert_eq!(bench.phases(1..=4), [DECODE, DECODE, PREFILL, WAITING]);
    bench.submit(5, 1, 500, 5);
    let plan = bench.plan();
    assert_eq!(bench.phases([3, 5]), [WAITING, PREFILL]);
    for id in [1, 3, 4, 5] {
        bench.end(id);
        assert_eq!(bench.scheduler.remove(id), None);
    }
    // What was planned before may be reported: it changes nothing.
    for item in &plan.items {
        bench.scheduler.ran(item, usize::from(item.samples));
    }
    assert_eq!(items(&bench.tick()), [(2, 1, 0)]);
    assert_eq!(bench.phases(1..=5), [None, DECODE, None, None, None]);
}

#[test]
fn bursts_have_pages_and_end_where_a_decision_is_due() {
    let mut bench = decoding(LIMITS, 8, 2);
    let burst = |bench: &mut Bench, most| bench.scheduler.plan(&mut bench.pool, most).burst;
    assert_eq!(burst(&mut bench, 32), 32);
    assert_eq!(bench.pool.pages[&1].len(), 1);
    assert_eq!(burst(&mut bench, 0), 1);
    // The pass after these would draw too much.
    bench.scheduler.find(2).unwrap().remaining = 9;
    assert_eq!(burst(&mut bench, 32), 9);
    bench.scheduler.set_drafts(2, 1);
    assert_eq!(burst(&mut bench, 32), 4);
    bench.scheduler.find(2).unwrap().remaining = 1000;
    bench.submit(3, 0, 30, 5);
    assert_eq!(burst(&mut bench, 32), 1, "a prompt is in prefill");
    bench.end(3);
    // 60 passes of up to two tokens: 1 may come to 71, 2 to 131. That is three pages more, taken in advance.
    assert_eq!(burst(&mut bench, 60), 60);
    assert_eq!([1, 2].map(|id| bench.pool.pages[&id].len()), [2, 3]);
    // The 8 pages are enough for 165 tokens of 1 and 320 of 2.
    assert_eq!(burst(&mut bench, 300), 155);
}

#[test]
fn a_request_that_cannot_be_admitted_yet_does_not_stop_bursts() {
    let mut bench = decoding(Limits { running: 2, ..LIMITS }, 20, 2);
    bench.submit(3, 0, 30, 5);
    assert_eq!(bench.scheduler.plan(&mut bench.pool, 8).burst, 8);
    bench.end(1);
    assert_eq!(bench.scheduler.plan(&mut bench.pool, 8).burst, 1);
}
