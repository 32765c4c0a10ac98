// Runs exported models in transformers.js and prints the results as JSON: node run.mjs FOLDER_OF_MODELS PICTURE
import { AutoModelForVision2Seq, CLIPModel, Tensor, env, pipeline } from "@huggingface/transformers";
import { readFile } from "node:fs/promises";

const [folder, picture] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = `${folder}/`;
const found = {};
const names = ["red apple", "dog", "rocket"];

for (const model of ["clip", "blip"]) {
  for (const dtype of ["fp32", "q8"]) {
    const classify = await pipeline("zero-shot-image-classification", model, { dtype });
    found[`${model} ${dtype}`] = await classify(picture, names, { hypothesis_template: "{}" });
  }
}
const caption = await pipeline("image-to-text", "captioner", { dtype: "fp32" });
found.caption = (await caption(picture))[0].generated_text;

// The same pixels and tokens as in Python
const given = JSON.parse(await readFile(`${folder}/inputs.json`));
const tensor = (type, { values, shape }) => new Tensor(type, type === "int64" ? values.map(BigInt) : values, shape);
const clip = await CLIPModel.from_pretrained("clip", { dtype: "fp32" });
const logits = await clip({ input_ids: tensor("int64", given.ids), pixel_values: tensor("float32", given.pixels) });
found.logits = logits.logits_per_image.tolist();
const captioner = await AutoModelForVision2Seq.from_pretrained("captioner", { dtype: "fp32" });
const tokens = await captioner.generate({ inputs: tensor("float32", given.blip_pixels), max_new_tokens: 8 });
found.tokens = tokens.tolist().map((row) => row.map(Number));
console.log(JSON.stringify(found));
