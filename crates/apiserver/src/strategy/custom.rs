//! Kinds that are custom resources elsewhere: all that is special about them is in their schema.

use api::schema::{self, Message};
use api::{Cause, ObjectExt};
use serde_json::Value;

use super::Strategy;

pub struct Custom;
pub static CUSTOM: Custom = Custom;

fn message(object: &Value) -> Option<&'static Message> {
    let (group, version) = object.text("/apiVersion").split_once('/')?;
    schema::for_kind(group, version, object.text("/kind"))
}

impl Strategy for Custom {
    fn default(&self, object: &mut Value) {
        if let Some(message) = message(object) {
            schema::apply_defaults(object, message);
        }
    }

    fn validate(&self, object: &Value, _: Option<&Value>) -> Vec<Cause> {
        message(object).map(|message| schema::violations(object, message)).unwrap_or_default()
    }

    fn has_generation(&self) -> bool {
        true
    }
}
