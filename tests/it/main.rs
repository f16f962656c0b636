//! Tests on real servers, one binary: `support` starts private nodes and processes, each other file is a behaviour.

mod broker_conformance;
mod consumer;
mod crash;
mod fence;
mod relay;
mod support;
mod window;
