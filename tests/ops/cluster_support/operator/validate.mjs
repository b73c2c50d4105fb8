// Holds objects of prometheus-operator against its published types: a JSON list on standard input, one line a fault out.
import { readFileSync } from "node:fs";
import * as types from "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1";

for (const object of JSON.parse(readFileSync(0, "utf8"))) {
  const where = `${object.kind} ${object.metadata?.name}`;
  const Type = types[object.kind];
  if (!Type) {
    console.log(`${where}: no such kind`);
    continue;
  }
  try {
    new Type(object).validate();
  } catch (error) {
    console.log(`${where}: ${error.message}`);
  }
}
