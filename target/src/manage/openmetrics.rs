//! The OpenMetrics text of everything that is counted, summed when it is asked for.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::{Registry, Unit};

use crate::metrics::{BOUNDS_US, Numbers, Operation, Series, Stage, Times};
use crate::target::Target;

/// The text.
pub(crate) fn text(target: &Arc<Target>) -> Result<String, fmt::Error> {
    let mut registry = Registry::with_prefix("flexblk");
    registry.register_collector(Box::new(Whole(Arc::clone(target))));
    let mut text = String::new();
    encode(&mut text, &registry)?;
    Ok(text)
}

struct Whole(Arc<Target>);

impl fmt::Debug for Whole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Whole")
    }
}

/// Labels of a pair of host and namespace.
fn labels<'a>(series: &'a Series, operation: &'a str) -> Vec<(&'static str, String)> {
    vec![
        ("host", series.host.clone()),
        ("subsystem", series.subsystem.clone()),
        ("nsid", series.nsid.to_string()),
        ("operation", operation.to_owned()),
    ]
}

impl Collector for Whole {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let sums = self.0.metrics().sum();
        counter(
            &mut encoder,
            &sums,
            "commands",
            "Completed I/O commands",
            |numbers| numbers.commands,
        )?;
        counter(
            &mut encoder,
            &sums,
            "failed_commands",
            "I/O commands completed with an error",
            |numbers| numbers.failed,
        )?;
        counter(
            &mut encoder,
            &sums,
            "data_bytes",
            "Bytes read or written",
            |numbers| numbers.bytes,
        )?;
        let help = "Time of I/O commands from the capsule to the response, and its parts: waiting for \
                    buffers, fetching data from the host, with the block device";
        let mut metric = encoder.encode_descriptor(
            "command_duration",
            help,
            Some(&Unit::Seconds),
            MetricType::Histogram,
        )?;
        for (series, operations) in &sums {
            for (operation, numbers) in used(operations) {
                for (stage, times) in Stage::ALL.iter().zip(&numbers.stages) {
                    let mut labels = labels(series, operation.name());
                    labels.push(("stage", stage.name().to_owned()));
                    let mut family = metric.encode_family(&labels)?;
                    let buckets = buckets(times);
                    let sum = times.sum_us as f64 / 1e6;
                    family.encode_histogram::<NoLabelSet>(sum, numbers.commands, &buckets, None)?;
                }
            }
        }
        self.threads(&mut encoder)
    }
}

impl Whole {
    /// Counters of transports and reactors, by thread, and what is open.
    fn threads(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let stats = self.0.stats();
        for (name, help, pick) in [
            (
                "transport",
                "Counters of the transport's engine and port",
                true,
            ),
            ("reactor", "Counters of the threads' loops", false),
        ] {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for thread in &stats.threads {
                let counters: Vec<(&&str, &u64)> = match pick {
                    true => thread.engine.iter().chain(&thread.port).collect(),
                    false => thread.reactor.iter().collect(),
                };
                for (counter, value) in counters {
                    let labels = [
                        ("thread", format!("data-{}", thread.thread)),
                        ("counter", (*counter).to_owned()),
                    ];
                    let mut family = metric.encode_family(&labels)?;
                    family.encode_counter::<NoLabelSet, u64, f64>(value, None)?;
                }
            }
        }
        let mut metric = encoder.encode_descriptor(
            "thread_cpu",
            "CPU time of the data threads",
            Some(&Unit::Seconds),
            MetricType::Counter,
        )?;
        for thread in &stats.threads {
            let labels = [("thread", format!("data-{}", thread.thread))];
            let mut family = metric.encode_family(&labels)?;
            let seconds = thread.cpu_us as f64 / 1e6;
            family.encode_counter::<NoLabelSet, f64, f64>(&seconds, None)?;
        }
        for (name, help, value) in [
            ("controllers", "Controllers", stats.controllers as u64),
            (
                "queues",
                "Queue pairs",
                stats
                    .threads
                    .iter()
                    .map(|thread| thread.queues as u64)
                    .sum(),
            ),
            (
                "memory_budget_free_bytes",
                "Bytes of the memory budget that are free",
                stats.budget_free_bytes,
            ),
        ] {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            metric.encode_gauge(&i64::try_from(value).unwrap_or(i64::MAX))?;
        }
        Ok(())
    }
}

fn counter(
    encoder: &mut DescriptorEncoder<'_>,
    sums: &[(Series, [Numbers; 3])],
    name: &str,
    help: &str,
    value: impl Fn(&Numbers) -> u64,
) -> Result<(), fmt::Error> {
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
    for (series, operations) in sums {
        for (operation, numbers) in used(operations) {
            let labels = labels(series, operation.name());
            let mut family = metric.encode_family(&labels)?;
            family.encode_counter::<NoLabelSet, u64, f64>(&value(numbers), None)?;
        }
    }
    Ok(())
}

/// The operations that a host has used.
fn used(operations: &[Numbers; 3]) -> impl Iterator<Item = (Operation, &Numbers)> {
    let all = Operation::ALL.into_iter().zip(operations);
    all.filter(|(_, numbers)| numbers.commands != 0)
}

fn buckets(times: &Times) -> Vec<(f64, u64)> {
    let bounds = BOUNDS_US.iter().map(|us| f64::from(*us) / 1e6);
    bounds.chain([f64::MAX]).zip(times.buckets).collect()
}
