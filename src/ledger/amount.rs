//! Exact amounts of money, and prices.
//!
//! A price has up to six decimals of a unit of currency per million tokens, which is a whole number of picounits (1e-12) per
//! token: 0.55 per million is 550 000 picounits a token. So every cost is an integer, and sums have no rounding.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign};
use std::str::FromStr;

use serde::{Serialize, Serializer};

/// Decimals of an [`Amount`]: a picounit is 1e-12 of the unit of currency.
const DECIMALS: usize = 12;
/// Picounits in a unit of currency.
const UNIT: u128 = 1_000_000_000_000;
/// Decimals of a price per million tokens.
const PRICE_DECIMALS: usize = 6;
/// The highest price, in whole units per million tokens. With it a request's cost fits an `i64` up to nine million tokens.
const MAX_PRICE: u128 = 1_000_000;
/// The largest amount that is parsed, in whole units.
const MAX_AMOUNT: u128 = 1_000_000_000_000_000;

/// Why a text is no amount or price.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AmountError {
    /// Something else than digits with at most one point between them.
    #[error("expected a decimal number such as 0.55")]
    NotDecimal,
    /// More decimals than are kept.
    #[error("has more than {0} decimals")]
    TooPrecise(usize),
    /// Above the largest.
    #[error("is more than {0}")]
    TooLarge(u128),
}

/// Parses `digits[.digits]` into multiples of `10^-decimals`.
fn parse(text: &str, decimals: usize, max: u128) -> Result<u128, AmountError> {
    let (whole, fraction) = match text.split_once('.') {
        Some((_, "")) => return Err(AmountError::NotDecimal),
        Some(parts) => parts,
        None => (text, ""),
    };
    if whole.is_empty() || !whole.bytes().chain(fraction.bytes()).all(|byte| byte.is_ascii_digit()) {
        return Err(AmountError::NotDecimal);
    }
    let fraction = fraction.trim_end_matches('0');
    if fraction.len() > decimals {
        return Err(AmountError::TooPrecise(decimals));
    }
    let scale = 10u128.pow(decimals as u32);
    let mut value = 0u128;
    for byte in whole.bytes() {
        value = value * 10 + u128::from(byte - b'0');
        if value > max {
            return Err(AmountError::TooLarge(max));
        }
    }
    let mut rest = 0;
    for place in 0..decimals {
        rest = rest * 10 + u128::from(fraction.as_bytes().get(place).map_or(0, |byte| byte - b'0'));
    }
    let value = value * scale + rest;
    if value > max * scale { Err(AmountError::TooLarge(max)) } else { Ok(value) }
}

/// An amount of money in picounits, never negative. It prints as an exact decimal number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Amount(u128);

impl Amount {
    /// Nothing.
    pub const ZERO: Self = Self(0);

    /// An amount of so many picounits (1e-12).
    pub const fn from_picounits(picounits: u128) -> Self {
        Self(picounits)
    }

    /// The amount in picounits.
    pub const fn picounits(self) -> u128 {
        self.0
    }

    /// Whole units, and the picounits beside them.
    pub(super) const fn parts(self) -> (u128, u128) {
        (self.0 / UNIT, self.0 % UNIT)
    }

    /// The amount of whole units and picounits beside them.
    pub(super) const fn from_parts(units: u128, picounits: u128) -> Self {
        Self(units.saturating_mul(UNIT).saturating_add(picounits))
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (units, rest) = self.parts();
        let fraction = format!("{rest:0DECIMALS$}");
        let fraction = fraction.trim_end_matches('0');
        let text = if fraction.is_empty() { units.to_string() } else { format!("{units}.{fraction}") };
        f.pad(&text)
    }
}

impl FromStr for Amount {
    type Err = AmountError;

    /// Parses a decimal number with up to 12 decimals.
    fn from_str(text: &str) -> Result<Self, AmountError> {
        parse(text, DECIMALS, MAX_AMOUNT).map(Self)
    }
}

impl Serialize for Amount {
    /// A JSON number: the double nearest to the amount, which prints as the amount itself up to 15 digits.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.to_string().parse().map_err(serde::ser::Error::custom)?)
    }
}

impl Add for Amount {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl AddAssign for Amount {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sum for Amount {
    fn sum<I: Iterator<Item = Self>>(amounts: I) -> Self {
        amounts.fold(Self::ZERO, Add::add)
    }
}

/// A price: picounits per token. Written and printed in units of currency per million tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Price(u64);

impl Price {
    /// Picounits (1e-12 of the unit of currency) for each token.
    pub const fn picounits_per_token(self) -> u64 {
        self.0
    }
}

impl FromStr for Price {
    type Err = AmountError;

    /// Parses units of currency per million tokens, with up to six decimals and at most a million.
    fn from_str(text: &str) -> Result<Self, AmountError> {
        parse(text, PRICE_DECIMALS, MAX_PRICE).map(|price| Self(price as u64))
    }
}

impl fmt::Display for Price {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Amount(u128::from(self.0) * UNIT / 10u128.pow(PRICE_DECIMALS as u32)).fmt(f)
    }
}

/// What tokens cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prices {
    /// Of a token of the prompt that had to be computed.
    pub input: Price,
    /// Of a token of the prompt that the prefix cache had.
    pub cache_hit: Price,
    /// Of a generated token.
    pub output: Price,
}

impl Prices {
    /// The prices that were given: what is missing costs nothing, but a cache hit then costs what other input does.
    /// `None` if there is no price at all, so that nobody is told a cost.
    pub fn given(input: Option<Price>, cache_hit: Option<Price>, output: Option<Price>) -> Option<Self> {
        input.or(cache_hit).or(output)?;
        let input = input.unwrap_or_default();
        Some(Self { input, cache_hit: cache_hit.unwrap_or(input), output: output.unwrap_or_default() })
    }

    /// The cost of so many tokens: of the prompt in the prefix cache and not in it, and generated.
    pub fn cost(&self, prompt_hit: u64, prompt_miss: u64, completion: u64) -> Amount {
        let of = |tokens: u64, price: Price| Amount(u128::from(tokens) * u128::from(price.0));
        of(prompt_hit, self.cache_hit) + of(prompt_miss, self.input) + of(completion, self.output)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn price(text: &str) -> Price {
        text.parse().unwrap()
    }

    #[test]
    fn reads_prices_exactly() {
        for (text, picounits, shown) in [
            ("0.55", 550_000, "0.55"),
            ("2.19", 2_190_000, "2.19"),
            ("0", 0, "0"),
            ("0.000001", 1, "0.000001"),
            ("007.5000000000", 7_500_000, "7.5"),
            ("1000000", 1_000_000_000_000, "1000000"),
        ] {
            assert_eq!(price(text).picounits_per_token(), picounits, "{text}");
            assert_eq!(price(text).to_string(), shown);
        }
    }

    #[test]
    fn refuses_what_is_no_price() {
        for text in
            ["", ".", ".5", "5.", "-1", "+1", "1e3", "1,5", " 1", "1 ", "NaN", "inf", "0x1", "1.2.3", "１", "1_0"]
        {
            assert_eq!(text.parse::<Price>(), Err(AmountError::NotDecimal), "{text:?}");
            assert_eq!(text.parse::<Amount>(), Err(AmountError::NotDecimal), "{text:?}");
        }
        assert_eq!("0.0000001".parse::<Price>(), Err(AmountError::TooPrecise(6)));
        for text in ["1000000.000001", "1000001", &"9".repeat(60)] {
            assert_eq!(text.parse::<Price>(), Err(AmountError::TooLarge(MAX_PRICE)), "{text}");
        }
        assert_eq!("0.0000000000001".parse::<Amount>(), Err(AmountError::TooPrecise(12)));
        assert_eq!("1000000000000001".parse::<Amount>(), Err(AmountError::TooLarge(MAX_AMOUNT)));
    }

    #[test]
    fn a_cache_hit_costs_as_input_unless_told() {
        let given = |input: Option<&str>, hit: Option<&str>, output: Option<&str>| {
            Prices::given(input.map(price), hit.map(price), output.map(price))
        };
        assert_eq!(given(None, None, None), None);
        let cost = |prices: Option<Prices>| prices.unwrap().cost(1, 10, 100).picounits();
        assert_eq!(cost(given(Some("0.5"), None, Some("2"))), 11 * 500_000 + 200_000_000);
        assert_eq!(cost(given(Some("0.5"), Some("0.1"), None)), 100_000 + 5_000_000);
        assert_eq!(cost(given(None, Some("0"), Some("1"))), 100_000_000);
    }

    #[test]
    fn json_numbers_are_the_decimals_themselves() {
        for text in ["0", "12.5", "0.000000000001", "0.00035739", "999.999999999999"] {
            let json = serde_json::to_string(&text.parse::<Amount>().unwrap()).unwrap();
            assert_eq!(json.parse::<f64>().unwrap().to_bits(), text.parse::<f64>().unwrap().to_bits(), "{text} {json}");
        }
        assert_eq!(serde_json::to_string(&"0.00035739".parse::<Amount>().unwrap()).unwrap(), "0.00035739");
    }

    proptest! {
        #[test]
        fn any_text_is_an_amount_or_an_error(text in "\\PC{0,30}") {
            if let Ok(amount) = text.parse::<Amount>() {
                prop_assert!(text.chars().all(|c| c.is_ascii_digit() || c == '.'));
                prop_assert_eq!(amount.to_string().parse::<Amount>(), Ok(amount));
            }
        }

        #[test]
        fn amounts_come_back(picounits in 0..=MAX_AMOUNT * UNIT) {
            let amount = Amount::from_picounits(picounits);
            prop_assert_eq!(amount.to_string().parse::<Amount>(), Ok(amount));
            let (units, rest) = amount.parts();
            prop_assert_eq!(Amount::from_parts(units, rest), amount);
        }

        #[test]
        fn prices_come_back(picounits in 0..=1_000_000_000_000u64) {
            let price = Price(picounits);
            prop_assert_eq!(price.to_string().parse::<Price>(), Ok(price));
        }

        /// However a request is cut into pieces, the pieces cost what the whole does.
        #[test]
        fn pieces_cost_what_the_whole_does(
            prices in proptest::array::uniform3(0..1_000_000_000_000u64),
            pieces in proptest::collection::vec(proptest::array::uniform3(0..1_000_000u64), 0..50),
        ) {
            let prices = Prices { input: Price(prices[0]), cache_hit: Price(prices[1]), output: Price(prices[2]) };
            let sum: Amount = pieces.iter().map(|[hit, miss, new]| prices.cost(*hit, *miss, *new)).sum();
            let total = |i: usize| pieces.iter().map(|piece| piece[i]).sum::<u64>();
            prop_assert_eq!(sum, prices.cost(total(0), total(1), total(2)));
        }
    }
}
