//! Tests on real servers, one binary: `support` starts private nodes and processes, each other file is a behaviour.

// In a test an unwrap that fails says what it should: the test fails there.
#![allow(clippy::unwrap_used)]

mod accept;
mod architecture;
mod broker_conformance;
mod cli;
mod config_errors;
mod consumer;
mod crash;
mod fence;
mod migrate;
mod privileges;
mod publish;
mod relay;
mod statements;
mod support;
mod window;
