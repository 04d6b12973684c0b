//! Which commands are outstanding, in the order in which they were sent: a list through the table of commands.

/// End of the list.
pub(super) const NONE: u16 = u16::MAX;

/// A command's neighbours.
#[derive(Clone, Copy, Debug)]
pub(super) struct Links {
    newer: u16,
    older: u16,
}

impl Links {
    /// In no list.
    pub(super) const NONE: Links = Links {
        newer: NONE,
        older: NONE,
    };
}

impl Default for Links {
    fn default() -> Links {
        Links::NONE
    }
}

impl Links {
    pub(super) fn newer(self) -> u16 {
        self.newer
    }
}

/// What has such links.
pub(super) trait Linked {
    fn links(&mut self) -> &mut Links;
}

/// Both ends of the list.
#[derive(Clone, Copy, Debug)]
pub(super) struct Order {
    oldest: u16,
    newest: u16,
    len: u16,
}

impl Order {
    pub(super) const EMPTY: Order = Order {
        oldest: NONE,
        newest: NONE,
        len: 0,
    };

    pub(super) fn len(self) -> u16 {
        self.len
    }

    pub(super) fn oldest(self) -> u16 {
        self.oldest
    }

    /// Appends `index`, which is not in the list.
    pub(super) fn push<T: Linked>(&mut self, table: &mut [T], index: u16) {
        let older = self.newest;
        if let Some(entry) = table.get_mut(usize::from(index)) {
            *entry.links() = Links { newer: NONE, older };
            match table.get_mut(usize::from(older)) {
                Some(before) => before.links().newer = index,
                None => self.oldest = index,
            }
            self.newest = index;
            self.len += 1;
        }
    }

    /// Takes `index` out, which is in the list.
    pub(super) fn remove<T: Linked>(&mut self, table: &mut [T], index: u16) {
        let Some(entry) = table.get_mut(usize::from(index)) else {
            return;
        };
        let Links { newer, older } = std::mem::take(entry.links());
        match table.get_mut(usize::from(older)) {
            Some(before) => before.links().newer = newer,
            None => self.oldest = newer,
        }
        match table.get_mut(usize::from(newer)) {
            Some(after) => after.links().older = older,
            None => self.newest = older,
        }
        self.len -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Entry(Links);

    impl Linked for Entry {
        fn links(&mut self) -> &mut Links {
            &mut self.0
        }
    }

    #[test]
    fn keeps_the_order_of_insertion() {
        let mut table: Vec<Entry> = (0..5).map(|_| Entry::default()).collect();
        let mut order = Order::EMPTY;
        let walk = |order: Order, table: &[Entry]| {
            let mut found = Vec::new();
            let mut at = order.oldest();
            while let Some(entry) = table.get(usize::from(at)) {
                found.push(at);
                at = entry.0.newer();
            }
            found
        };
        for index in [3, 0, 4, 1] {
            order.push(&mut table, index);
        }
        assert_eq!(walk(order, &table), [3, 0, 4, 1]);
        order.remove(&mut table, 4);
        order.remove(&mut table, 3);
        assert_eq!(walk(order, &table), [0, 1]);
        assert_eq!(order.len(), 2);
        order.push(&mut table, 3);
        order.remove(&mut table, 1);
        order.remove(&mut table, 0);
        order.remove(&mut table, 3);
        assert_eq!(walk(order, &table), Vec::<u16>::new());
        assert_eq!(order.len(), 0);
        order.push(&mut table, 2);
        assert_eq!(walk(order, &table), [2]);
    }
}
