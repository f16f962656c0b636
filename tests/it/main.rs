//! Tests on real servers, one binary: `support` starts private nodes and processes, each other file is a behaviour.

// In a test an unwrap that fails says what it should: the test fails there.
#![allow(clippy::unwrap_used)]

mod accept;
mod architecture;
mod audit;
mod batches;
mod broker_conformance;
mod cli;
mod config_errors;
mod consumer;
mod crash;
mod doctor;
mod fence;
mod http_handler;
mod ledger;
mod migrate;
mod parked;
mod pause;
mod poison;
mod privileges;
mod publish;
mod receive;
mod relay;
mod replay;
mod retention;
mod scale_out;
mod source_guard;
mod statements;
mod status;
mod stream_order;
mod support;
mod unroutable;
mod window;
