//! Tests on real servers, one binary: `support` starts private nodes and processes, each other file is a behaviour.

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
