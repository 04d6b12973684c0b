//! Round-trip time and retransmission timeout (RFC 6298), in nanoseconds.

/// Estimator of one connection.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Rtt {
    smoothed_ns: u64,
    variation_ns: u64,
}

impl Rtt {
    /// Takes a measured round trip of a packet that was sent once (Karn's rule).
    pub(crate) fn sample(&mut self, rtt_ns: u64) {
        if self.smoothed_ns == 0 {
            self.smoothed_ns = rtt_ns.max(1);
            self.variation_ns = rtt_ns / 2;
        } else {
            let deviation = self.smoothed_ns.abs_diff(rtt_ns);
            self.variation_ns = self.variation_ns - self.variation_ns / 4 + deviation / 4;
            self.smoothed_ns = (self.smoothed_ns - self.smoothed_ns / 8 + rtt_ns / 8).max(1);
        }
    }

    /// Timeout after `attempts` that were not answered: each is twice as patient as the one before.
    pub(crate) fn timeout_ns(&self, attempts: u8, min_ns: u64, max_ns: u64) -> u64 {
        let base = if self.smoothed_ns == 0 {
            min_ns.saturating_mul(4)
        } else {
            self.smoothed_ns
                .saturating_add(self.variation_ns.saturating_mul(4))
        };
        let shift = u32::from(attempts).min(32);
        base.max(min_ns)
            .saturating_mul(1 << shift)
            .min(max_ns.max(min_ns))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn converges_and_backs_off() {
        let mut rtt = Rtt::default();
        assert_eq!(rtt.timeout_ns(0, 1_000, 1 << 40), 4_000);
        for _ in 0..100 {
            rtt.sample(50_000);
        }
        assert_eq!(rtt.smoothed_ns, 50_000 / 8 * 8);
        let first = rtt.timeout_ns(0, 1_000, 1 << 40);
        assert!((50_000..52_000).contains(&first), "{first}");
        assert_eq!(rtt.timeout_ns(1, 1_000, 1 << 40), first * 2);
        assert_eq!(rtt.timeout_ns(200, 1_000, 9_000_000), 9_000_000);
        assert_eq!(rtt.timeout_ns(0, 1_000_000, 1 << 40), 1_000_000);
    }
}
