//! Edits as people write them: what is shown can be typed, what is wrong is named.

mod common;

use common::model;
use moewe_plan::{Edit, ModelInfo, Place, check_edits};
use proptest::prelude::*;

fn layers() -> impl Strategy<Value = Option<u32>> {
    prop_oneof![Just(None), any::<u32>().prop_map(Some)]
}

fn places() -> impl Strategy<Value = Place> {
    (layers(), any::<u32>()).prop_map(|(layer, number)| Place { layer, number })
}

fn edits() -> impl Strategy<Value = Edit> {
    let finite = any::<f32>().prop_filter("finite", |factor| factor.is_finite());
    prop_oneof![
        places().prop_map(Edit::Mute),
        places().prop_map(Edit::Force),
        (places(), finite).prop_map(|(place, factor)| Edit::Scale(place, factor)),
        (layers(), prop::collection::vec(any::<u32>(), 1..9)).prop_map(|(layer, experts)| Edit::Pin(layer, experts)),
        places().prop_map(Edit::ZeroLatent),
        places().prop_map(Edit::ZeroHead),
    ]
}

/// Text that is nearly right: words and numbers of edits in any order.
fn scrambled() -> impl Strategy<Value = String> {
    let parts = [
        "mute", "force", "scale", "pin", "zero", "latent", "head", " ", " ", "3", "*", ":", "17", "=", "0.5", "+", "-",
    ];
    prop::collection::vec(prop::sample::select(parts.to_vec()), 0..9).prop_map(|parts| parts.concat())
}

proptest! {
    #[test]
    fn what_is_written_is_read_as_it_was(edit in edits()) {
        prop_assert_eq!(edit.to_string().parse::<Edit>(), Ok(edit));
    }

    #[test]
    fn what_is_read_is_written_so_that_it_is_read_again(text in prop_oneof![scrambled(), any::<String>()]) {
        if let Ok(edit) = text.parse::<Edit>() {
            prop_assert_eq!(edit.to_string().parse::<Edit>(), Ok(edit));
        }
    }

    #[test]
    fn spaces_do_not_matter(edit in edits(), before in " {0,3}", between in "[ \t]{1,3}", behind in " {0,3}") {
        let text = format!("{before}{}{behind}", edit.to_string().replace(' ', &between));
        prop_assert_eq!(text.parse::<Edit>(), Ok(edit));
    }
}

#[test]
fn every_kind_is_understood() {
    let place = |layer, number| Place { layer, number };
    let cases = [
        ("mute 3:17", Edit::Mute(place(Some(3), 17))),
        ("force *:17", Edit::Force(place(None, 17))),
        ("scale 3:17=0.5", Edit::Scale(place(Some(3), 17), 0.5)),
        ("pin 3:1+5+8+17", Edit::Pin(Some(3), vec![1, 5, 8, 17])),
        ("zero latent 3:7", Edit::ZeroLatent(place(Some(3), 7))),
        ("zero head *:2", Edit::ZeroHead(place(None, 2))),
    ];
    for (text, edit) in cases {
        assert_eq!(text.parse(), Ok(edit), "{text}");
    }
}

#[test]
fn what_is_wrong_is_named() {
    let cases = [
        ("", "is no change; expected mute 3:17"),
        ("mutr 3:17", "\"mutr 3:17\" is no change; expected mute 3:17"),
        ("mute", "\"\" is no place; expected LAYER:NUMBER"),
        ("mute 3", "\"3\" is no place"),
        ("force 3:x", "\"3:x\" is no place"),
        ("force 3:1 2", "\"3:1 2\" is no place"),
        ("scale 3:17", "\"3:17\": expected LAYER:EXPERT=FACTOR, such as 3:17=0.5"),
        ("scale 3:17=NaN", "expected LAYER:EXPERT=FACTOR"),
        ("pin 3", "\"3\": expected LAYER:EXPERT+EXPERT+…"),
        ("pin 3:1++2", "expected LAYER:EXPERT+EXPERT+…"),
        ("zero 3:7", "\"zero 3:7\": expected zero latent LAYER:NUMBER or zero head LAYER:HEAD"),
        ("zero latent 3:-1", "\"3:-1\" is no place"),
        ("MUTE 3:17", "is no change"),
    ];
    for (text, expected) in cases {
        let error = text.parse::<Edit>().expect_err(text);
        assert!(error.contains(expected), "{text}: {error}");
    }
}

fn check(model: &ModelInfo, edits: &str) -> Result<(), String> {
    let edits: Vec<Edit> = edits.split(", ").map(|edit| edit.parse().expect(edit)).collect();
    check_edits(model, &edits).map_err(|error| error.to_string())
}

#[test]
fn edits_are_checked_against_a_model_without_its_plan() {
    for possible in
        ["mute 1:0, mute *:3", "pin *:0+3", "scale 4:0=-2", "zero latent 0:2, zero head *:1", "force *:0, force 2:1"]
    {
        assert_eq!(check(&model(), possible), Ok(()), "{possible}");
    }
    let cases = [
        ("mute 0:1", "mute 0:1: no such layer; the layers that have it are 1 to 4"),
        ("mute *:4", "mute *:4: there is no number 4, expected 0 to 3"),
        ("zero head 0:2", "expected 0 to 1"),
        ("zero latent 5:0", "the layers that have it are 0 to 4"),
        ("pin 1:0", "pin 1:0: 1 experts, expected 2 different ones"),
        ("mute *:0, mute *:1, mute 3:2", "layer 3: 1 experts are left, at least 2 are needed"),
        ("force *:0, force *:1, force 2:2", "layer 2: 3 experts are forced, at most 2 can be"),
    ];
    for (edits, expected) in cases {
        let error = check(&model(), edits).expect_err(edits);
        assert!(error.contains(expected), "{edits}: {error}");
    }
    let dense = ModelInfo { moe_layers: Vec::new(), experts: 0, ..model() };
    assert!(check(&dense, "scale *:0=2").unwrap_err().contains("the model has no routed experts"));
    assert_eq!(check(&dense, "zero head 4:1"), Ok(()));
}
