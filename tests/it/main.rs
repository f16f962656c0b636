//! Tests on real servers, one binary: `support` starts private nodes and processes, each other file is a behaviour.

// In a test an unwrap that fails says what it should: the test fails there.
#![allow(clippy::unwrap_used)]

mod accept;
mod api;
mod api_limits;
mod architecture;
mod audit;
mod batches;
mod bench;
mod bench_flows;
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
mod plans;
mod poison;
mod privileges;
mod publish;
mod publisher_faults;
mod publisher_tls;
mod receive;
mod relay;
mod replay;
mod retention;
mod room;
mod saga;
mod saga_api;
mod saga_api_events;
mod saga_barrier;
mod saga_cli;
mod saga_conformance;
mod saga_crash;
mod saga_decide;
mod saga_enlisted;
mod saga_model;
mod saga_rules;
mod saga_store;
mod saga_verify;
mod scale_out;
mod source_guard;
mod statements;
mod status;
mod stream_order;
mod support;
mod unroutable;
mod window;
