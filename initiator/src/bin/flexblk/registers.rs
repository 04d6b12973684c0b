//! `flexblk show-regs`.

use anyhow::Result;
use flexblk_initiator::{AdminCommand, Controller};
use flexblk_nvme::Sgl;
use flexblk_nvme::command::fabrics::PropertyGet;
use flexblk_nvme::property::{Property, Vs};
use serde_json::{Map, Value};

use crate::connect;
use crate::nvme_args::{Inspect, OutputFormat};

pub(crate) fn show(args: &Inspect) -> Result<()> {
    let options = connect::options(&args.address, &args.connection, false)?;
    let controller = Controller::connect(&options)?;
    let mut values = Vec::new();
    for property in Property::ALL {
        // The reset of the whole subsystem and the ready time-outs are not for every controller.
        match get(&controller, *property) {
            Ok(value) => values.push((*property, value)),
            Err(flexblk_initiator::Error::Status { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    if args.output_format == OutputFormat::Json {
        let object: Map<String, Value> = values
            .iter()
            .map(|(property, value)| (name(*property).to_owned(), (*value).into()))
            .collect();
        println!("{:#}", Value::Object(object));
        return Ok(());
    }
    for (property, value) in values {
        match property {
            Property::Vs => {
                let version = Vs::from_bits(value as u32);
                println!("{:<5}: {value:#x} (NVMe {version})", name(property));
            }
            property => println!("{:<5}: {value:#x}", name(property)),
        }
    }
    Ok(())
}

fn get(controller: &Controller, property: Property) -> Result<u64, flexblk_initiator::Error> {
    let get = PropertyGet {
        offset: property.offset(),
        width: property.width(),
    };
    let reply = controller.admin(AdminCommand {
        name: "Property Get",
        sqe: Box::new(move |cid| get.emit(cid, &Sgl::NONE)),
        data_out: Vec::new(),
        data_in_bytes: 0,
    })?;
    Ok(reply.result)
}

fn name(property: Property) -> &'static str {
    match property {
        Property::Cap => "cap",
        Property::Vs => "version",
        Property::Cc => "cc",
        Property::Csts => "csts",
        Property::Nssr => "nssr",
        Property::Crto => "crto",
    }
}
