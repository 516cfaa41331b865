//! Types of fields that JSON or clients write in several ways.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Unexpected, Visitor};
use serde_json::{Map, Value};

use crate::api::shown;

/// A structure that is written as an object. (Derived structures take lists of their fields, too.)
#[derive(Debug)]
pub(super) struct Object<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Fields<T> {
            type Value = Object<T>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Object<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Object)
            }
        }
        deserializer.deserialize_map(Fields(PhantomData))
    }
}

/// A list of at most `MAX` elements.
#[derive(Debug)]
pub(super) struct List<T, const MAX: usize>(pub Vec<T>);

impl<'de, T: Deserialize<'de>, const MAX: usize> Deserialize<'de> for List<T, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Elements<T, const MAX: usize>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for Elements<T, MAX> {
            type Value = List<T, MAX>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a list")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<List<T, MAX>, A::Error> {
                let mut list = Vec::new();
                while let Some(element) = seq.next_element()? {
                    if list.len() == MAX {
                        return Err(A::Error::custom(format_args!(
                            "found more than {MAX} elements, expected at most {MAX}"
                        )));
                    }
                    list.push(element);
                }
                Ok(List(list))
            }
        }
        deserializer.deserialize_seq(Elements(PhantomData))
    }
}

/// Any number.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Number(pub f64);

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl Visitor<'_> for Any {
            type Value = Number;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a number")
            }

            fn visit_f64<E: Error>(self, value: f64) -> Result<Number, E> {
                Ok(Number(value))
            }

            fn visit_i64<E: Error>(self, value: i64) -> Result<Number, E> {
                Ok(Number(value as f64))
            }

            fn visit_u64<E: Error>(self, value: u64) -> Result<Number, E> {
                Ok(Number(value as f64))
            }
        }
        deserializer.deserialize_f64(Any)
    }
}

/// Any whole number of 64 bits, signed or not. JSON has one kind of numbers only, so 5.0 is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Integer(pub i128);

/// Above two to the power of 53 several integers are the same to a parser that takes them for fractions.
const EXACT: f64 = 9_007_199_254_740_992.0;

impl<'de> Deserialize<'de> for Integer {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Whole;
        impl Visitor<'_> for Whole {
            type Value = Integer;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an integer")
            }

            fn visit_f64<E: Error>(self, value: f64) -> Result<Integer, E> {
                match value {
                    _ if value.fract() != 0.0 => Err(E::invalid_type(Unexpected::Float(value), &self)),
                    _ if value.abs() <= EXACT => Ok(Integer(value as i128)),
                    _ => Err(E::invalid_value(Unexpected::Float(value), &"an integer of 64 bits")),
                }
            }

            fn visit_i64<E: Error>(self, value: i64) -> Result<Integer, E> {
                Ok(Integer(value.into()))
            }

            fn visit_u64<E: Error>(self, value: u64) -> Result<Integer, E> {
                Ok(Integer(value.into()))
            }
        }
        deserializer.deserialize_any(Whole)
    }
}

/// The id of a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TokenId(pub u32);

impl<'de> Deserialize<'de> for TokenId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Integer(id) = Integer::deserialize(deserializer)?;
        let out_of_range = |_| D::Error::custom(format_args!("found {id}, expected a token id"));
        u32::try_from(id).map(Self).map_err(out_of_range)
    }
}

/// Any JSON, each field of its objects once.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Json(pub Value);

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Json;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("JSON")
            }

            fn visit_unit<E: Error>(self) -> Result<Json, E> {
                Ok(Json(Value::Null))
            }

            fn visit_bool<E: Error>(self, value: bool) -> Result<Json, E> {
                Ok(Json(value.into()))
            }

            fn visit_i64<E: Error>(self, value: i64) -> Result<Json, E> {
                Ok(Json(value.into()))
            }

            fn visit_u64<E: Error>(self, value: u64) -> Result<Json, E> {
                Ok(Json(value.into()))
            }

            fn visit_f64<E: Error>(self, value: f64) -> Result<Json, E> {
                Ok(Json(value.into()))
            }

            fn visit_str<E: Error>(self, value: &str) -> Result<Json, E> {
                Ok(Json(value.into()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Json, A::Error> {
                let mut list = Vec::new();
                while let Some(Json(element)) = seq.next_element()? {
                    list.push(element);
                }
                Ok(Json(Value::Array(list)))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Json, A::Error> {
                let mut object = Map::new();
                while let Some((key, Json(value))) = map.next_entry::<String, Json>()? {
                    if object.contains_key(&key) {
                        return Err(A::Error::custom(format_args!("duplicate field `{key}`")));
                    }
                    object.insert(key, value);
                }
                Ok(Json(Value::Object(object)))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

/// One text, or a list of at most `MAX`.
#[derive(Debug)]
pub(super) struct Texts<const MAX: usize>(pub Vec<String>);

impl<'de, const MAX: usize> Deserialize<'de> for Texts<MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneOrMore<const MAX: usize>;
        impl<'de, const MAX: usize> Visitor<'de> for OneOrMore<MAX> {
            type Value = Texts<MAX>;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Texts<MAX>, E> {
                Ok(Texts(vec![text.to_owned()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Texts<MAX>, A::Error> {
                let List(texts) = List::<String, MAX>::deserialize(serde::de::value::SeqAccessDeserializer::new(seq))?;
                Ok(Texts(texts))
            }
        }
        deserializer.deserialize_any(OneOrMore)
    }
}

/// What is said in a message: a text, or a list of parts that are texts. Their texts are put together as they are.
#[derive(Debug)]
pub(super) struct Content(pub String);

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextOrParts;
        impl<'de> Visitor<'de> for TextOrParts {
            type Value = Content;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a string or a list of parts {\"type\": \"text\", \"text\": …}")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Content, E> {
                Ok(Content(text.to_owned()))
            }

            fn visit_string<E: Error>(self, text: String) -> Result<Content, E> {
                Ok(Content(text))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Content, A::Error> {
                let mut text = String::new();
                while let Some(Part(part)) = seq.next_element()? {
                    text += &part;
                }
                Ok(Content(text))
            }
        }
        deserializer.deserialize_any(TextOrParts)
    }
}

/// The text of a part of a message.
struct Part(String);

impl<'de> Deserialize<'de> for Part {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(serde::Deserialize)]
        struct Fields {
            #[serde(rename = "type")]
            kind: Option<String>,
            text: Option<String>,
        }
        let Object(Fields { kind, text }) = Object::deserialize(deserializer)?;
        match (kind.as_deref(), text) {
            (Some("text"), Some(text)) => Ok(Self(text)),
            (Some("text"), None) => Err(D::Error::custom("found a part without `text`, expected its text")),
            (None, _) => Err(D::Error::custom("found a part without `type`, expected \"text\"")),
            (Some(kind), _) => {
                let kind = shown(kind);
                Err(D::Error::custom(format_args!(
                    "found a part of type {kind}, expected \"text\": the model reads text only"
                )))
            }
        }
    }
}

/// What is added to tokens' logits, by id; each id once, in order.
#[derive(Debug)]
pub(super) struct Bias(pub Vec<(u32, f32)>);

/// Most entries of `logit_bias`.
const MAX_BIAS: usize = 1024;

impl<'de> Deserialize<'de> for Bias {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Bias;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object with token ids for names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Bias, A::Error> {
                let mut bias = Vec::new();
                while let Some((key, Number(value))) = map.next_entry::<String, Number>()? {
                    // One spelling for each number, so that none comes twice.
                    let Some(id) = key.parse::<u32>().ok().filter(|id| id.to_string() == key) else {
                        let key = shown(&key);
                        return Err(A::Error::custom(format_args!("found the name {key}, expected a token id")));
                    };
                    if !(-100.0..=100.0).contains(&value) {
                        let what = format_args!("found {value} for token {id}, expected a number from -100 to 100");
                        return Err(A::Error::custom(what));
                    }
                    if bias.len() == MAX_BIAS {
                        return Err(A::Error::custom(format_args!(
                            "found more than {MAX_BIAS} tokens, expected at most {MAX_BIAS}"
                        )));
                    }
                    bias.push((id, value as f32));
                }
                bias.sort_by_key(|(id, _)| *id);
                if let Some([(id, _), _]) = bias.array_windows().find(|[(a, _), (b, _)]| a == b) {
                    return Err(A::Error::custom(format_args!("duplicate field `{id}`")));
                }
                Ok(Bias(bias))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}
